"""Declares the kernels' C interface (source/baton.cpp) to Python; a call runs without the interpreter's lock."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path

from workers.errors import InvariantViolated
from workers.model.native.build import BuildFailed
from workers.runner import LayerHook


class WeightPart(IntEnum):
    """What a weight is to the model; the order is that of `enum class Part` in source/model.h."""

    EMBEDDING = 0
    HEAD = 1
    NORM = 2
    INPUT_NORM = 3
    QUERY = 4
    KEY = 5
    VALUE = 6
    OUTPUT = 7
    MLP_NORM = 8
    ROUTER = 9
    ROUTER_BIAS = 10
    GATE = 11
    UP = 12
    DOWN = 13


class Dimensions(ctypes.Structure):
    """`struct Dimensions` of source/model.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "vocab_size", "first_token", "num_tokens", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
                "head_dim", "dense_width", "num_experts", "num_choices", "num_slots", "expert_width", "shared_width",
                "num_threads",
            )
        ),
        ("eps", ctypes.c_double),
        ("norm_min", ctypes.c_double),
        ("frequencies", ctypes.c_void_p),
        ("is_mixture", ctypes.c_void_p),
    )  # fmt: skip


class StepArguments(ctypes.Structure):
    """`struct Step` of source/model.h."""

    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("num_slices", ctypes.c_int64),
        ("num_entries", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("pool_heads", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("token_ids", "positions", "first_rows", "tables", "first_blocks", "cos", "sin")
        ),
    )


class SlotWork(ctypes.Structure):
    """`struct SlotWork` of source/model.h."""

    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("ends", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
    )


_OnLayer = ctypes.CFUNCTYPE(None, ctypes.c_int64)

_SIGNATURES = {
    "baton_create": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)),
    "baton_destroy": (None, (ctypes.c_void_p,)),
    "baton_take": (ctypes.c_char_p, (ctypes.c_void_p, *(ctypes.c_int64,) * 5, ctypes.c_void_p)),
    "baton_have_all": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "baton_weights": (ctypes.c_bool, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)),
    "baton_forward": (ctypes.c_char_p, (*(ctypes.c_void_p,) * 4, ctypes.c_int64, _OnLayer)),
    "baton_begin": (ctypes.c_char_p, (ctypes.c_void_p,) * 3),
    "baton_attend": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 3)),
    "baton_feed_forward": (ctypes.c_char_p, (ctypes.c_void_p, *(ctypes.c_int64,) * 2, *(ctypes.c_void_p,) * 2)),
    "baton_route": (ctypes.c_char_p, (ctypes.c_void_p, *(ctypes.c_int64,) * 2, *(ctypes.c_void_p,) * 4)),
    "baton_run_slots": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 3)),
    "baton_run_shared": (ctypes.c_char_p, (ctypes.c_void_p, *(ctypes.c_int64,) * 2, *(ctypes.c_void_p,) * 2)),
    "baton_combine": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 5)),
    "baton_give": (ctypes.c_char_p, (ctypes.c_void_p, *(ctypes.c_int64,) * 2, ctypes.c_void_p)),
    "baton_rearrange": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 2)),
    "baton_head": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 3)),
    "baton_draw": (
        ctypes.c_char_p,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p),
    ),
    "baton_allow": (ctypes.c_char_p, ()),
    "baton_struct_bytes": (None, (ctypes.c_void_p,)),
    "baton_instruction_set": (ctypes.c_char_p, ()),
    "baton_arithmetic": (ctypes.c_char_p, (ctypes.c_int64,)),
}


class Library:
    """The loaded kernels. A call that reports an error raises InvariantViolated with its message."""

    def __init__(self, path: Path) -> None:
        """Raises BuildFailed when the file is no such library."""
        try:
            self._functions = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise BuildFailed(f"{path} cannot be loaded: {error}") from error
        refusal: bytes | None = self._functions.baton_allow()
        if refusal is not None:
            raise BuildFailed(refusal.decode())

    def struct_bytes(self) -> tuple[int, int]:
        """Sizes of Dimensions and StepArguments as the library has them."""
        sizes = (ctypes.c_int64 * 2)()
        self._functions.baton_struct_bytes(sizes)
        return sizes[0], sizes[1]

    @property
    def instruction_set(self) -> str:
        """What the kernels were compiled for."""
        name: bytes = self._functions.baton_instruction_set()
        return name.decode()

    def arithmetic(self, is_bf16: bool) -> str:
        """How products are rounded: libraries that give the same name compute the same bits."""
        name: bytes = self._functions.baton_arithmetic(int(is_bf16))
        return name.decode()

    def create(self, dimensions: Dimensions, is_bf16: bool) -> ctypes.c_void_p:
        model = ctypes.c_void_p()
        _check(self._functions.baton_create(ctypes.byref(dimensions), int(is_bf16), ctypes.byref(model)))
        return model

    def destroy(self, model: ctypes.c_void_p) -> None:
        self._functions.baton_destroy(model)

    def take(
        self, model: ctypes.c_void_p, part: WeightPart, layer: int, expert: int, first: int, count: int, address: int
    ) -> None:
        """Copies `count` rows of a weight, from row `first` on; a vector is one element a row."""
        _check(self._functions.baton_take(model, int(part), layer, expert, first, count, address))

    def have_all(self, model: ctypes.c_void_p) -> None:
        """Says that `weights` were filled whole, as another model of the same dimensions had them."""
        _check(self._functions.baton_have_all(model))

    def weights(self, model: ctypes.c_void_p) -> tuple[memoryview, ...]:
        """The memory of all packed weights, bytes that may be written; valid until `destroy`."""
        found: list[memoryview] = []
        address, num_bytes = ctypes.c_void_p(), ctypes.c_int64()
        while self._functions.baton_weights(model, len(found), ctypes.byref(address), ctypes.byref(num_bytes)):
            assert address.value is not None
            found.append(memoryview((ctypes.c_char * num_bytes.value).from_address(address.value)).cast("B"))
        return tuple(found)

    def forward(
        self, model: ctypes.c_void_p, step: StepArguments, pool: int, x: int, on_layer: LayerHook | None = None
    ) -> None:
        every, call = (on_layer.every, _OnLayer(on_layer.call)) if on_layer is not None else (0, _OnLayer())
        _check(self._functions.baton_forward(model, ctypes.byref(step), pool, x, every, call))

    def begin(self, model: ctypes.c_void_p, step: StepArguments, x: int) -> None:
        _check(self._functions.baton_begin(model, ctypes.byref(step), x))

    def attend(
        self, model: ctypes.c_void_p, step: StepArguments, layer: int, pool: int, x: int, to: int | None
    ) -> None:
        _check(self._functions.baton_attend(model, ctypes.byref(step), layer, pool, x, to))

    def feed_forward(self, model: ctypes.c_void_p, layer: int, num_rows: int, x: int, to: int | None) -> None:
        _check(self._functions.baton_feed_forward(model, layer, num_rows, x, to))

    def route(
        self, model: ctypes.c_void_p, layer: int, num_rows: int, x: int, normed: int, weights: int, chosen: int
    ) -> None:
        _check(self._functions.baton_route(model, layer, num_rows, x, normed, weights, chosen))

    def run_slots(self, model: ctypes.c_void_p, layer: int, work: SlotWork, rows: int, to: int) -> None:
        _check(self._functions.baton_run_slots(model, layer, ctypes.byref(work), rows, to))

    def run_shared(self, model: ctypes.c_void_p, layer: int, num_rows: int, rows: int, to: int) -> None:
        _check(self._functions.baton_run_shared(model, layer, num_rows, rows, to))

    def combine(
        self,
        model: ctypes.c_void_p,
        num_rows: int,
        outputs: int,
        places: int,
        weights: int,
        shared: int | None,
        to: int,
    ) -> None:
        _check(self._functions.baton_combine(model, num_rows, outputs, places, weights, shared, to))

    def give(self, model: ctypes.c_void_p, layer: int, slot: int, to: int) -> None:
        """Writes the weights in a slot as the checkpoint has them."""
        _check(self._functions.baton_give(model, layer, slot, to))

    def rearrange(self, model: ctypes.c_void_p, layer: int, slots: int, given: int) -> None:
        _check(self._functions.baton_rearrange(model, layer, slots, given))

    def head(self, model: ctypes.c_void_p, x: int, num_rows: int, logits: int | None, best: int, peaks: int) -> None:
        _check(self._functions.baton_head(model, x, num_rows, logits, best, peaks))

    def draw(
        self, model: ctypes.c_void_p | None, logits: int, num_rows: int, size: int, specs: bytes, drawn: int
    ) -> None:
        """Draws from every row of logits, on the threads of `model` if there is one; see source/draw.h."""
        _check(self._functions.baton_draw(model, logits, num_rows, size, specs, drawn))


def _check(message: bytes | None) -> None:
    if message is not None:
        raise InvariantViolated(message.decode(errors="replace"))
