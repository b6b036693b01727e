"""Promises that the repository makes about itself: direction of imports, generated stubs, names."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("workers", "router", "cluster")
GENERATED = ROOT / "workers" / "pb"


def sources(*rooms: str) -> list[Path]:
    return [p for room in rooms for p in sorted((ROOT / room).rglob("*.py")) if GENERATED not in p.parents]


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("workers", {"router", "cluster", "ray", "redis", "fastapi"}), ("router", {"cluster", "ray", "redis", "torch"})],
)
def test_dependencies_point_one_way(room: str, forbidden: set[str]) -> None:
    offenders = {str(p.relative_to(ROOT)): bad for p in sources(room) if (bad := imported(p) & forbidden)}
    assert not offenders


FLOORS = {
    "workers": (
        "errors", "state_table", "deadlines", "shares", "checkpoint_files", "limits", "token_logprobs", "request", "log_context", "status", "config", "trust", "machine", "kv_memory", "runner", "model/checkpoint", "text", "sampling", "grammar", "kv_cache", "scheduler",
        "kv_tiers", "engine", "pb", "wire", "transports", "handoff/protocol", "handoff", "tracing", "trace_export", "serving",
        "model/parallel", "model/decoder", "model/native", "model/cpu", "model/cuda/kernels", "model/cuda",
        "model", "group", "worker", "group_worker",
    ),
    "router": (
        "resume", "line_file", "api/formats", "fleet/worker_table", "fleet/prefix_index", "forecast", "policies", "tenants", "config", "sampling_defaults", "wishes", "job_part", "events", "fleet",
        "requests", "core", "roles", "backend", "driver", "direct", "api", "http_protocol", "http_server", "https", "listening", "server",
    ),
    "cluster": (
        "settings", "aliases", "hub", "secret_files", "store", "roles/config", "config", "logs", "tenants", "membership", "roles", "console", "steps", "ray_session", "probes", "actors", "preflight", "identity", "lifecycle", "doctor", "llm", "local_backend", "batch", "sim",
        "commands", "cli",
    ),
}  # fmt: skip
"""The rooms of each package, values below and assemblies above: a room imports from itself and from those before it."""


def floor_of(path: Path) -> tuple[str, int]:
    """The package of a file, and the number of its room there; of two rooms that hold it the inner one counts."""
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    places = {"/".join(rest[:length]) for length in range(1, len(rest) + 1)} & set(FLOORS[package])
    assert places, f"{path.relative_to(ROOT)} stands in no room: give it one, or add a room to FLOORS"
    return package, FLOORS[package].index(max(places, key=len))


def modules_of(path: Path) -> set[Path]:
    """Files of the repository that a file imports, wherever in the file, also for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {ROOT / (name.replace(".", "/") + ".py") for name in names}
    return {file for file in files if file.is_file()}


def test_a_room_imports_only_rooms_below_it() -> None:
    offenders = []
    for path in sources(*ROOMS):
        if path.name == "__init__.py":
            continue
        package, floor = floor_of(path)
        for module in modules_of(path):
            if module.is_relative_to(ROOT / package) and floor_of(module)[1] > floor:
                offenders.append(f"{path.relative_to(ROOT)} imports {module.relative_to(ROOT)}, which stands above it")
    assert not offenders


def test_tensors_stay_in_the_model_room() -> None:
    allowed = {ROOT / "workers" / "model", ROOT / "workers" / "sampling"}
    # These hand bytes to torch.distributed and to the device; they see no tensor of a model.
    carriers = {ROOT / "workers/transports" / f"{name}.py" for name in ("pair_group", "nccl", "cuda_ipc")}
    offenders = [
        p for p in sources("workers") if "torch" in imported(p) and not allowed & set(p.parents) and p not in carriers
    ]
    assert not offenders


def test_protobuf_is_known_only_at_the_edge() -> None:
    edge = {
        ROOT / "workers" / f"{name}.py"
        for name in (
            "wire/attach_protobuf", "wire/request_protobuf", "wire/grpc_client", "worker", "serving/server", "serving/streams",
            "group/message_codec", "group/step_codec", "handoff/protobuf", "handoff/transfers", "handoff/service", "handoff/source_driver",
            "handoff/target_driver",
        )
    }  # fmt: skip
    offenders = [
        str(path.relative_to(ROOT)) for path in sources(*ROOMS) if "workers.pb" in path.read_text() and path not in edge
    ]
    assert not offenders


PURE = (
    "workers/state_table.py",
    "workers/deadlines.py",
    "workers/shares.py",
    "workers/scheduler",
    "workers/kv_cache",
    "workers/handoff/protocol",
    "workers/kv_memory/pieces.py",
    "workers/group/balance.py",
    "workers/group/formation.py",
    "workers/group/message_codec.py",
    "workers/group/messages.py",
    "workers/group/step_codec.py",
    "workers/model/parallel/layout.py",
    "workers/model/parallel/expert_placement.py",
    "workers/serving/core.py",
    "workers/serving/events.py",
    "workers/serving/exports.py",
    "workers/serving/kept_answers.py",
    "workers/serving/fetches.py",
    "workers/serving/request_table.py",
    "workers/serving/requests.py",
    "workers/serving/served_request.py",
    "workers/serving/standing.py",
    "workers/serving/sessions.py",
    "workers/engine/messages.py",
    "workers/engine/leaping.py",
    "router/core.py",
    "router/requests",
    "router/fleet",
    "router/policies",
    "router/forecast",
    "router/job_part.py",
    "router/wishes.py",
    "cluster/membership/membership.py",
    "cluster/roles/candidates.py",
    "cluster/roles/carrying_out.py",
    "cluster/roles/core.py",
    "cluster/roles/events.py",
    "cluster/roles/forecasting.py",
    "cluster/roles/leadership.py",
    "cluster/roles/mirror.py",
    "cluster/roles/orders.py",
    "cluster/roles/outlook.py",
    "cluster/roles/planner.py",
    "cluster/roles/records.py",
    "cluster/roles/report.py",
    "cluster/roles/switches.py",
    "cluster/roles/values.py",
    "cluster/actors/placement.py",
    "cluster/sim/planning/plan.py",
    "cluster/sim/planning/question.py",
    "cluster/sim/planning/search.py",
    "cluster/sim/profiles",
    "cluster/sim/report/page.py",
    "cluster/sim/report/table.py",
)


def run_by(path: Path) -> set[str]:
    """Modules that importing a file imports, by their full names; those for type checkers only are not."""
    tree = ast.parse(path.read_text())
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def reached(path: Path) -> dict[str, str]:
    """All modules that importing a file brings in, through modules of the repository, each with who imports it first."""
    found: dict[str, str] = {}
    waiting = [path]
    while waiting:
        current = waiting.pop()
        for name in run_by(current):
            if name in found:
                continue
            found[name] = str(current.relative_to(ROOT))
            inside = ROOT / (name.replace(".", "/") + ".py")
            if inside.is_file():
                waiting.append(inside)
    return found


EFFECTS = {"asyncio", "threading", "torch", "ray", "grpc", "redis", "time", "socket", "random"}


def test_decisions_are_pure() -> None:
    paths = [
        p for name in PURE for p in ([ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")))
    ]
    assert len(paths) > len(PURE)
    offenders = [
        f"{path.relative_to(ROOT)} reaches {name} by way of {via}"
        for path in paths
        for name, via in reached(path).items()
        if name.split(".")[0] in EFFECTS
    ]
    assert not offenders


GIVEN_THE_TIME = ("workers/handoff", "workers/serving", "workers/wire/grpc_client.py")
"""Time is an argument below the drivers: these are told it, or given a clock. What looks at the clock by itself cannot be simulated."""


def test_nothing_below_the_drivers_looks_at_the_clock() -> None:
    paths = [
        p for name in GIVEN_THE_TIME for p in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py"))
    ]
    assert len(paths) > len(GIVEN_THE_TIME)
    offenders = []
    for path in paths:
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "time"]
        calls = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("time.", "datetime."))
        ]
        offenders += [f"{path.relative_to(ROOT)}:{node.lineno}" for node in (*imports, *calls)]
    assert not offenders


def test_generated_stubs_match_the_protos(tmp_path: Path) -> None:
    protos = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    assert protos
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs, *protos], check=True, cwd=ROOT
    )
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.py*"))
    assert made
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"{path}: run `make protos`"


def test_init_files_hold_a_docstring_only() -> None:
    for path in sources(*ROOMS):
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and ast.get_docstring(ast.parse(path.read_text())), path


def test_every_file_says_what_it_does() -> None:
    silent = [
        str(p.relative_to(ROOT))
        for p in [*sources(*ROOMS), *sorted((ROOT / "bench").glob("*.py")), *sorted((ROOT / "models").glob("*.py"))]
        if not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent


def test_no_module_shadows_the_standard_library_or_a_dependency() -> None:
    installed = set(importlib.metadata.packages_distributions()) - {"cluster", "router", "workers"}
    taken = set(sys.stdlib_module_names) | installed
    # Ray and scripts put a file's own folder on sys.path; inside a package that matters for top-level folders only.
    tops = [*(ROOT / "bench").glob("*.py"), *(ROOT / "models").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    tops += [p for room in ROOMS for p in (ROOT / room).glob("*.py")]
    offenders = [str(p.relative_to(ROOT)) for p in tops if p.stem in taken and p.stem != "__init__"]
    assert not offenders


def test_tracked_files_name_no_private_path() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    here, home = str(ROOT) + "/", str(Path.home()) + "/"
    offenders = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".json", ".yaml", ".proto", ""}:
            text = path.read_text(errors="ignore")
            offenders += [name for prefix in (here, home) if prefix in text]
    assert not offenders


def classes(paths: list[Path]) -> dict[str, str]:
    """Names of classes at the top of files, each with its file."""
    return {
        node.name: str(path.relative_to(ROOT))
        for path in paths
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }


def test_the_simulator_writes_nothing_of_the_product_again() -> None:
    simulator = ROOT / "cluster" / "sim"
    product = classes([path for path in sources(*ROOMS) if simulator not in path.parents])
    twins = {
        name: (where, product[name])
        for name, where in classes(sorted(simulator.rglob("*.py"))).items()
        if name in product
    }
    assert not twins


def test_docs_name_only_files_that_exist() -> None:
    """In backquotes with their suffix, by path or by the end of one; and what links lead to."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    known = {"/" + name for name in listed.split("\0")}
    missing = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if page.name == "benchmarks-history.md":  # it names what was there then
            continue
        text = page.read_text()
        named = set(re.findall(r"`([\w./-]+\.(?:py|md|h|cpp|proto|svg))`", text))
        missing += [(page.name, name) for name in sorted(named) if not any(k.endswith("/" + name) for k in known)]
        links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
        missing += [(page.name, link) for link in sorted(filter(None, links)) if not (page.parent / link).exists()]
    assert not missing
