"""Routers come, go and take requests up in any order: no output is lost or repeated, and no bound is passed."""

from __future__ import annotations

from collections.abc import Iterator

from builders import make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_story import WorkerStory

from workers.engine.messages import CancelSequence
from workers.request import FinishReason
from workers.serving import events


class Everything:
    """Routers come, go, stop reading and take up what others left; an engine draws tokens. Checks what must always be true."""

    def __init__(self) -> None:
        self.story = WorkerStory(
            max_orphans=3, orphan_grace_s=5.0, max_kept_tokens=6, max_pending_frames=2, max_num_seqs=4
        )
        self.sessions: set[int] = set()
        self.routers: dict[int, str] = {}
        self.num_sessions = self.num_attempts = 0
        self.names: dict[str, int] = {}
        """The engine's number of each request."""
        self.drawn: dict[str, int] = {}
        self.attempts: dict[str, tuple[int, str, int]] = {}
        """Attempt -> its session, its request, and the position that it began at."""

    def attach(self, router_id: str = "") -> None:
        """Another router, or one that is attached already and comes anew."""
        self.num_sessions += 1
        self.sessions.add(self.num_sessions)
        self.routers[self.num_sessions] = router_id or f"router-{self.num_sessions}"
        self.story.attach(self.num_sessions, self.routers[self.num_sessions])

    def lose(self, session: int) -> None:
        self.sessions.discard(session)
        self.story.lose(session)

    def submit(self, session: int) -> None:
        name = f"r{len(self.names)}"
        attempt = self.begin(session, name, 0)
        number = self.story.submit(session, make_request(range(5, 105), 50, request_id=attempt), name=name)
        assert number
        self.names[name], self.drawn[name] = number, 0

    def adopt(self, session: int, name: str, position: int) -> None:
        served = self.story.core._requests._table._by_name.get(name)
        is_kept = served is not None and served.first_kept <= position <= served.end
        refused = self.story.core.counters["adoptions_refused"]
        self.story.adopt(session, name, self.begin(session, name, position), position)
        assert (self.story.core.counters["adoptions_refused"] == refused) is is_kept

    def begin(self, session: int, name: str, position: int) -> str:
        self.num_attempts += 1
        attempt = f"{name}#{self.num_attempts}"
        self.attempts[attempt] = session, name, position
        return attempt

    def draw(self, name: str, is_last: bool) -> None:
        number = self.names[name]
        if CancelSequence(number) in self.story.posted or self.drawn[name] < 0:
            return
        position = self.drawn[name]
        self.drawn[name] = -1 if is_last else position + 1
        self.story.say(number, "the engine's", position, position, ends=FinishReason.STOP if is_last else None)

    def check(self) -> None:
        story, core = self.story, self.story.core
        table = core._requests._table
        self.sessions -= story.cut | story.ended
        assert len({self.routers[session] for session in self.sessions}) == len(self.sessions)
        assert story.attached == self.sessions
        assert all(len(session.outputs) <= 2 * 4 for session in core._sessions._sessions.values())
        # Each request has at most one owner, a session that is attached, and what is kept is bounded.
        owned = [served for served in table]
        assert len({served.name for served in owned}) == len(owned)
        assert all(served.owner is None or served.owner in self.sessions for served in owned)
        by_owner = [served for attempts in table._owned.values() for served in attempts.values()]
        assert {id(s) for s in by_owner} == {id(s) for s in owned if s.owner is not None} and len(by_owner) <= len(
            owned
        )
        assert all(served.owner is None for served in table._orphans.values())
        assert table.num_orphans <= 3 and all(served.num_kept <= 6 for served in owned)
        # Each attempt hears its own tokens, from where it began, without a gap or a repeat.
        for attempt, (session, name, begun) in self.attempts.items():
            outputs = [o for o in story.heard(session) if o.request_id == attempt and o.refusal is None]
            heard = [token for output in outputs for token in output.token_ids]
            assert heard == list(range(begun, begun + len(heard))), (attempt, name)
        for served in owned:  # and all of them, where nothing holds its frames up
            if served.owner is not None and served.owner not in story.stuck:
                begun = self.attempts[served.attempt][2]
                heard = [o for o in story.heard(served.owner) if o.request_id == served.attempt]
                assert begun + sum(len(o.token_ids) for o in heard) == self.drawn[served.name]
        for session, frames in story.frames.items():
            names = {self.attempts[o.request_id][0] for frame in frames for o in frame.outputs}
            assert names <= {session}


def steps(draw: st.DrawFn) -> Iterator[None]:
    """One thing after another happens to a worker."""
    world = Everything()
    for _ in range(draw(st.integers(5, 60))):
        kinds = ["attach", "time"]
        if world.sessions:
            kinds += ["submit", "lose", "stick", "write", "cancel", "return"]
        if world.names:
            kinds += ["draw"] * 4 + (["adopt"] * 2 if world.sessions else [])
        kind = draw(st.sampled_from(kinds))
        session = draw(st.sampled_from(sorted(world.sessions))) if world.sessions else 0
        name = draw(st.sampled_from(sorted(world.names))) if world.names else ""
        match kind:
            case "attach":
                world.attach()
            case "return":
                world.attach(world.routers[session])
            case "time":
                world.story.after(draw(st.sampled_from([0.1, 1.0, 6.0])))
            case "submit":
                world.submit(session)
            case "lose":
                world.lose(session)
            case "stick":
                world.story.stuck.add(session)
            case "write":
                world.story.stuck.discard(session)
                world.story.tell(events.FrameWanted(session))
            case "cancel":
                world.story.cancel(session, draw(st.sampled_from(sorted(world.attempts) or [""])))
            case "draw":
                world.draw(name, is_last=draw(st.integers(0, 9)) == 0)
            case "adopt":
                world.adopt(session, name, draw(st.integers(0, max(0, world.drawn[name]))))
        world.check()
        yield
    # In the end nothing is left behind.
    for session in sorted(world.sessions):
        world.lose(session)
    world.story.after(6.0)
    assert world.story.core.is_idle


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_whatever_happens_no_output_is_lost_or_repeated_and_no_bound_is_passed(data: st.DataObject) -> None:
    for _ in steps(data.draw):
        pass
