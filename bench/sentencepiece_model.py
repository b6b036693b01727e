"""Writes tokenizer.model for a checkpoint that has only tokenizer.json: llama.cpp's converter reads no other vocabulary of ERNIE 4.5.

Run by the interpreter that has sentencepiece: `python sentencepiece_model.py CHECKPOINT`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2


def write(folder: Path) -> None:
    """Same ids, same pieces; scores fall with the id, as a trained model's do."""
    vocabulary: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    for piece, token_id in sorted(vocabulary.items(), key=lambda item: item[1]):
        entry = model.pieces.add(piece=piece, score=-float(token_id))
        if piece.startswith("<0x"):
            entry.type = kinds.BYTE
        elif piece == "<unk>":
            entry.type = kinds.UNKNOWN
        elif token_id <= 2:
            entry.type = kinds.CONTROL
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = type(trainer).BPE, True, len(vocabulary)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.name = "identity"
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
