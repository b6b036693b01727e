"""The parts of the product that a simulation runs, in one place: all that is imported here is the product's own, and nothing of it is written again."""

from __future__ import annotations

from cluster.membership.membership import WORKERS, Membership, Registration
from cluster.membership.membership import Tick as MembershipTick
from cluster.roles import events as roles_events
from cluster.roles.config import RolesConfig
from cluster.roles.core import RolesCore
from cluster.roles.outlook import RoleTargets
from cluster.roles.planner import Planner, RoleController
from cluster.roles.records import CONTROL, SWITCHES, switch_of
from cluster.store.store import ABSENT, SETTLE_S, Entry, Snapshot
from router import events as router_events
from router.config import RouterConfig
from router.core import RouterCore
from router.driver import make_policy
from router.fleet.seen import workers_seen
from router.roles import Order
from router.tenants.salts import Salts
from router.wishes import NO_WISHES, Wishes
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.engine.messages import EngineCommand, LayersFilled, Report, StepResult
from workers.engine.thread import STALL_CHECK_S, carry_out, report_of
from workers.errors import InvalidConfig, InvariantViolated, Refusal
from workers.handoff.protocol import source_session as source_end
from workers.handoff.protocol import target_session as target_end
from workers.handoff.protocol.messages import (
    Done,
    Handoff,
    HandoffAccepted,
    HandoffDown,
    HandoffFailed,
    HandoffRefused,
    HandoffUp,
    KvPiece,
    KvPieces,
    Offer,
    OpenHandoff,
)
from workers.handoff.protocol.source_session import SourceSession
from workers.handoff.protocol.target_session import TargetSession
from workers.handoff.protocol.transfer import Due, TransferState
from workers.kv_cache.block_hash import PromptTokens, token_bytes
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.kv_memory.pieces import Cut
from workers.request import FinishReason, HandoffReport, Output, Request, SamplingParams
from workers.runner import BLOCK_SIZE, Batch, LayerHook, Sampled, SequenceSlice
from workers.scheduler.scheduler import Limits
from workers.scheduler.sequence import Sequence, State
from workers.serving import events as worker_events
from workers.serving.core import WorkerCore
from workers.status import Identity, Load, ModelInfo, Role, WorkerAddress, WorkerStatus, first_generation, starts_of
from workers.wire.attach import Adopt, Submit, WorkerFrame

__all__ = [
    "ABSENT",
    "BLOCK_SIZE",
    "CONTROL",
    "NO_WISHES",
    "SETTLE_S",
    "STALL_CHECK_S",
    "SWITCHES",
    "WORKERS",
    "Adopt",
    "Batch",
    "Cut",
    "Done",
    "Due",
    "Engine",
    "EngineCommand",
    "Entry",
    "FinishReason",
    "Handoff",
    "HandoffAccepted",
    "HandoffDown",
    "HandoffFailed",
    "HandoffRefused",
    "HandoffReport",
    "HandoffUp",
    "Identity",
    "InvalidConfig",
    "InvariantViolated",
    "KvLayout",
    "KvMemory",
    "KvPiece",
    "KvPieces",
    "LayerHook",
    "LayersFilled",
    "Limits",
    "Load",
    "Membership",
    "MembershipTick",
    "ModelInfo",
    "Offer",
    "OpenHandoff",
    "Order",
    "Output",
    "Planner",
    "PromptTokens",
    "Refusal",
    "Registration",
    "Report",
    "Request",
    "Role",
    "RoleController",
    "RoleTargets",
    "RolesConfig",
    "RolesCore",
    "RouterConfig",
    "RouterCore",
    "Salts",
    "Sampled",
    "SamplingParams",
    "Sequence",
    "SequenceSlice",
    "Snapshot",
    "SourceSession",
    "State",
    "StepResult",
    "Submit",
    "TargetSession",
    "TransferState",
    "Wishes",
    "WorkerAddress",
    "WorkerConfig",
    "WorkerCore",
    "WorkerFrame",
    "WorkerStatus",
    "carry_out",
    "first_generation",
    "make_policy",
    "report_of",
    "roles_events",
    "router_events",
    "source_end",
    "starts_of",
    "switch_of",
    "target_end",
    "token_bytes",
    "worker_events",
    "workers_seen",
]  # fmt: skip
