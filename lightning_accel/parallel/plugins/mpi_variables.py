"""`MPIVariables`: processes that `mpirun` started, by the variables it gives them, without mpi4py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_accel.errors import Unsupported, explain


class _Names(NamedTuple):
    rank: str
    size: str
    local_rank: str
    local_size: str


_KNOWN = (
    _Names(  # Open MPI
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names(  # MVAPICH2
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    _Names("PMI_RANK", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),  # Cray
)
_DEFAULT_PORT = 29500


class MPIVariables(ClusterEnvironment):
    """Find the other processes by the variables of Open MPI, MVAPICH2, MPICH, Intel MPI or Cray PALS.

    Lightning's `MPIEnvironment` asks mpi4py, which must be there and be built for the same MPI; torch needs no MPI but the
    numbers. The address of the first process is what these variables do not tell: on several machines set MASTER_ADDR.

    Raises:
        Unsupported: No such variables are there, or they do not fit together, or an address is missing.

    >>> MPIVariables.detect()
    False
    """

    def __init__(self) -> None:
        names = _names(os.environ)
        if names is None:
            raise Unsupported(
                "no variables of `mpirun` tell which process this is",
                "none of OMPI_COMM_WORLD_RANK, MV2_COMM_WORLD_RANK, PMI_RANK with its local rank",
                "start with `mpirun -np N python ...`, or leave `MPIVariables` out",
            )
        self._rank, self._size, self._local, self._here = (
            _number(os.environ, name) for name in names
        )
        self._check(names)

    def _check(self, names: _Names) -> None:
        fits = self._rank < self._size and 0 < self._here <= self._size
        if not fits or self._size % self._here or self._rank % self._here != self._local:
            found = ", ".join(f"{name}={os.environ[name]}" for name in names)
            what = "Lightning numbers processes machine by machine, equally many on each"
            raise Unsupported(
                what, found, "start them so, `mpirun --map-by ppr:N:node --rank-by slot`"
            )
        if self._here < self._size and "MASTER_ADDR" not in os.environ:
            raise Unsupported(
                "processes on several machines must know the address of the first one",
                "no MASTER_ADDR",
                "pass it on: `mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ...`",
            )

    @staticmethod
    @override
    def detect() -> bool:
        """Whether `mpirun` started this process among several."""
        names = _names(os.environ)
        return names is not None and os.environ[names.size] != "1"

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    @override
    def main_port(self) -> int:
        return _number(os.environ, "MASTER_PORT") if "MASTER_PORT" in os.environ else _DEFAULT_PORT

    @override
    def world_size(self) -> int:
        return self._size

    @override
    def set_world_size(self, size: int) -> None:
        """Leave it as `mpirun` says."""

    @override
    def global_rank(self) -> int:
        return self._rank

    @override
    def set_global_rank(self, rank: int) -> None:
        rank_zero_only.rank = self._rank  # type: ignore[attr-defined]

    @override
    def local_rank(self) -> int:
        return self._local

    @override
    def node_rank(self) -> int:
        return self._rank // self._here

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if (num_devices, num_nodes) != (self._here, self._size // self._here):
            raise ValueError(
                explain(
                    "the Trainer asks for other processes than `mpirun` started",
                    f"devices={num_devices}, num_nodes={num_nodes}; "
                    f"{self._here} on each of {self._size // self._here} machines",
                    f"pass devices={self._here}, num_nodes={self._size // self._here}",
                )
            )


def _names(environ: Mapping[str, str]) -> _Names | None:
    return next((names for names in _KNOWN if all(name in environ for name in names)), None)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not text.strip().isdigit():
        what = f"the variable {name} is a whole number"
        raise Unsupported(what, repr(text), "start the processes with `mpirun`, or set it right")
    return int(text)
