"""What a training step takes on many processes: memory and messages of each, and time at given rates; without torch.

What is counted is what saekit does (see ``docs/scaling.md``, which says how it was checked).  A process of a mesh
``data × features`` has ``1 / features`` of whatever has an axis of features, all of the rest, and ``rows / data`` rows.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

__all__ = ["Job", "Mesh", "Message", "Rates", "advised", "meshes"]

_FLOAT, _LONG = 4, 8
_CHUNK = 1024
"""Rows at a time of which a fast step holds all features: :data:`saekit.kernels.encoder.CHUNK`."""


@attrs.frozen
class Mesh:
    """Processes, ``data × features``."""

    data: int = 1
    features: int = 1

    @property
    def size(self) -> int:
        """All of them."""
        return self.data * self.features


@attrs.frozen
class Message:
    """What the processes of a group tell each other in one step."""

    what: str
    over: str
    """``data`` or ``features``: the group."""
    gathers: bool
    """Whether each hears what every other has; else each hears the sum."""
    size: float
    """Bytes that each process gives."""

    def sent(self, processes: int) -> float:
        """Bytes that each of so many processes sends where they stand in a ring (Patarasuk and Yuan 2009, "Bandwidth
        optimal all-reduce algorithms"): a sum goes round twice, less what is there, and a gathered part once."""
        return self.size * (processes - 1) * (1.0 if self.gathers else 2.0 / processes)


@attrs.frozen
class Rates:
    """What a device does in a second."""

    flops: float
    """Additions and multiplications of products of matrices."""
    memory: float
    """Bytes read or written."""
    links: float
    """Bytes that each process sends."""


@attrs.frozen
class Job:
    """An SAE in training, float32, as far as costs depend on it."""

    split: int
    """Numbers of its parameters that have an axis of features."""
    alike: int
    """All others."""
    d_in: int
    d_out: int
    d_sae: int
    rows: int
    """Of a whole batch."""
    k: int = 0
    """Entries of each row that are active, where their number is given, as in TopK; 0: it is not."""
    competes: str | None = "features"
    """Where these compete with those of other processes: ``features``, each row by itself, or ``all``, the whole batch
    together, as in BatchTopK; None: nowhere."""
    moments: float = 2
    """Numbers that the optimizer keeps of each parameter."""
    screened: bool = False
    """Whether a first look in bfloat16 finds what is active, as on CPUs: then a chunk's features and a copy of the
    encoder are there in half as many bytes, and no chunk of features in float32."""
    gathers_rows: bool = True
    """Whether each process has rows of its own, which a feature group gathers."""

    @classmethod
    def topk(cls, d: int, d_sae: int, rows: int, k: int) -> Job:
        """TopK with ``W_enc``, ``W_dec``, ``b_enc`` and ``b_dec``, trained by Adam."""
        return cls(2 * d * d_sae + d_sae, d, d, d, d_sae, rows, k)

    @property
    def _competing(self) -> str | None:
        return self.competes if self.k else None

    def parameters(self, mesh: Mesh) -> float:
        """Of one process."""
        return self.split / mesh.features + self.alike

    def state_bytes(self, mesh: Mesh) -> float:
        """Parameters, gradients, the optimizer's moments and firing counts of one process."""
        return self.parameters(mesh) * (2 + self.moments) * _FLOAT + 2 * _LONG * self.d_sae / mesh.features

    def step_bytes(self, mesh: Mesh) -> float:
        """What a fast step takes beside that: features of a chunk of rows, and inputs, outputs and their gradients."""
        rows = self.rows / mesh.data
        own = self.d_sae / mesh.features
        features = (0.5 if self.screened else 1.5) * min(rows, _CHUNK) * own
        features += 0.5 * self.d_in * own if self.screened else 0
        exchanged = sum(
            message.size / _FLOAT * (self._processes(message, mesh) + 1)
            for message in self.messages(mesh)
            if message.gathers
        )
        return _FLOAT * (features + 4 * rows * (self.d_in + self.d_out) + exchanged)

    def bytes(self, mesh: Mesh) -> float:
        """Of one process, for the SAE and its steps."""
        return self.state_bytes(mesh) + self.step_bytes(mesh)

    def messages(self, mesh: Mesh) -> list[Message]:
        """Those of one step, the few numbers of losses and metrics left out."""
        found, rows = [], self.rows / mesh.data
        if mesh.features > 1:
            if self.gathers_rows:
                found.append(Message("rows", "features", True, _FLOAT * self.rows / mesh.size * self.d_in))
            if self._competing == "features":
                found.append(Message("largest features", "features", True, _FLOAT * rows * self.k))
            found.append(Message("reconstructions", "features", False, _FLOAT * rows * self.d_out))
            found.append(Message("gradient of b_dec", "features", False, _FLOAT * self.d_in))
        if mesh.data > 1:
            found.append(Message("gradients", "data", False, _FLOAT * self.parameters(mesh)))
            found.append(Message("firing counts", "data", False, _LONG * self.d_sae / mesh.features))
        if self._competing == "all":  # any process may have all that are active, padded to as many
            most = _FLOAT * min(self.rows * self.k, rows * self.d_sae / mesh.features)
            if mesh.features > 1:
                found.append(Message("largest features", "features", True, most))
            if mesh.data > 1:  # by then each knows those of its feature group
                found.append(Message("largest features", "data", True, mesh.features * most))
        return found

    @staticmethod
    def _processes(message: Message, mesh: Mesh) -> int:
        return mesh.data if message.over == "data" else mesh.features

    def sent_bytes(self, mesh: Mesh) -> float:
        """What each process sends in a step."""
        return sum(message.sent(self._processes(message, mesh)) for message in self.messages(mesh))

    def seconds(self, mesh: Mesh, rates: Rates) -> float:
        """Of a step: products, the optimizer's way through memory, and messages, one after the other.

        The encoder meets all features, ``2 d_in`` operations for each row and feature; what follows meets ``k`` of
        each row, or where ``k`` is 0 all, in four more products.
        """
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        active = self.k / mesh.features if self.k else own
        operations = 2 * rows * (self.d_in * own + 2 * (self.d_in + self.d_out) * active)
        moved = self.parameters(mesh) * _FLOAT * (3 + 2 * self.moments)  # weights and moments there and back, gradients
        return operations / rates.flops + moved / rates.memory + self.sent_bytes(mesh) / rates.links


def meshes(size: int) -> list[Mesh]:
    """Every way to arrange ``size`` processes, that with the fewest parts of features first."""
    return [Mesh(size // features, features) for features in range(1, size + 1) if size % features == 0]


def advised(job: Job, size: int, possible: Callable[[Mesh], bool], free: float) -> Mesh | None:
    """Of ``size`` processes the ``possible`` mesh on which each sends least, where each fits into ``free`` bytes.

    Products are shared out alike on all of them, so what differs is what is sent; where two send as much, that with
    fewer parts of features.  None: on no mesh does it fit.
    """
    fitting = [mesh for mesh in meshes(size) if possible(mesh) and job.bytes(mesh) <= free]
    return min(fitting, key=job.sent_bytes, default=None)
