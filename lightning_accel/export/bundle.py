"""A folder with a network as files that run without its code: what `deploy` writes and `load_bundle` opens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_accel.arguments import one_of
from lightning_accel.arguments import path as as_path
from lightning_accel.errors import AccelError, explain
from lightning_accel.export import backends, manifest, signature
from lightning_accel.export.page import table
from lightning_accel.export.schema import Predictor, Runner, Schema
from lightning_accel.export.structure import class_name


class Bundle:
    """A folder with a network, opened: `predict` answers as the model does.

    Attributes:
        path: Its folder.
        manifest: All that is known of it, as plain data.
        format: What `predict` runs: "export", "aoti" or "onnx".
        faster: Whether that was measured to be faster than the model, on the machine that made it.
        table: The candidates with their numbers, to print.
    """

    def __init__(
        self, path: Path, content: Mapping[str, Any], name: str, predict: Predictor
    ) -> None:
        self.path, self.manifest, self.format = path, content, name
        self.faster: bool = content["faster"] and name == content["format"]
        self.table: str = table(content)
        self._predict = predict

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as the model does in eval mode; arrays of NumPy are taken too, and nothing that is passed is changed.

        Raises:
            TypeError: Number, nesting or type of the arguments differ from the example's.
            ValueError: Their sizes do, where the bundle has fixed ones.
        """
        return self._predict(*args, **kwargs)

    def __repr__(self) -> str:
        """Say where it lies and what it runs."""
        return f"Bundle({str(self.path)!r}, format={self.format!r})"


def load_bundle(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    classes: Sequence[type] = (),
    verify: Any = None,
) -> Bundle:
    """Open a bundle, after size and hash of each file were found to be those of its manifest.

    The hashes tell that it is undamaged, not whose it is: open only bundles from where you trust, or pass `verify`.

    Args:
        path: The folder.
        format: What to run, among what it holds; by default what was fastest where it was made. Machine code for
            another processor is left aside for a portable file, with a warning.
        classes: Of named tuples and dataclasses in the answer; without them it has look-alikes with the same fields.
        verify: A public key, as a PEM file: the bundle has to be signed with its private part (`deploy(sign=...)`).

    Raises:
        FileNotFoundError: There is no such folder, or no file of a key.
        ValueError: The file holds no public Ed25519 key.
        Unsupported: `verify` without the package `cryptography`.
        BadBundle: It is damaged, incomplete, or something else.
        AccelError: Nothing that it holds can run here.
    """
    folder = as_path("path", path)
    content = manifest.read(folder, None if verify is None else signature.public_key(verify))
    one_of("format", format, tuple(content["formats"]), none=True)
    return opened(folder, content, format, {class_name(cls): cls for cls in classes})


def opened(
    folder: Path, content: Mapping[str, Any], wanted: str | None, classes: Mapping[str, type]
) -> Bundle:
    """Open a folder whose manifest was read, with what can run here.

    Raises:
        AccelError: There is nothing.
    """
    schema = Schema.from_dict(content["signature"])
    best = wanted or content["format"]
    others = sorted(content["formats"], key=lambda name: (name != "onnx", name))
    order = [best] if wanted else list(dict.fromkeys([best, *others]))
    reasons = []
    for name in order:
        runner, reason = _loaded(name, folder, content, schema)
        if runner is None:
            reasons.append(f"{name}: {reason}")
            continue
        if reasons:
            warnings.warn(
                explain(
                    f"the bundle in {folder} runs as {name!r}, not as {best!r}",
                    "; ".join(reasons),
                    "deploy on this machine for its fastest format",
                ),
                stacklevel=3,
            )
        return Bundle(folder, content, name, Predictor(schema, runner, classes))
    raise AccelError(
        f"nothing in the bundle in {folder} can run here",
        "; ".join(reasons),
        "deploy with formats=('onnx',) as well",
    )


def _loaded(
    name: str, folder: Path, content: Mapping[str, Any], schema: Schema
) -> tuple[Runner | None, str]:
    """Open one file, or say why it cannot run here."""
    back_end = backends.FORMATS[name]
    reason = back_end.lacking() if back_end.portable else manifest.foreign(content["host"])
    if reason:
        return None, reason
    try:
        return backends.load(name, folder / content["formats"][name], schema), ""
    except Exception as error:  # of another runtime, whose errors are of many kinds
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
