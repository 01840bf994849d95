"""What a training step takes on many processes: memory and messages of each, and time at given rates; without torch.

What is counted is what saekit does (see ``docs/scaling.md``, which says how it was checked).  A process of a mesh
``data × features`` has ``1 / features`` of whatever has an axis of features, all of the rest, and ``rows / data`` rows.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from saekit.distributed.sizes import FEW, LARGE, OF_ALL, OF_ROWS, counts_sent

__all__ = ["Job", "Mesh", "Message", "Rates", "advised", "meshes"]

_FLOAT, _LONG = 4, 8
_CHUNK = 1024
"""Rows at a time of which a fast step holds all features: :data:`saekit.kernels.encoder.CHUNK`."""
_ENTRIES, _ENTRY = 1 << 18, 64
"""Entries of a sparse group, and about the bytes that one takes with all that is made of it."""
_EXCESS = 1.5
"""Times as many candidates as are wanted where entries compete over the whole batch."""
_BLOCK = 2048
"""Features at a time of which CPUs make weight gradients."""


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
    revives: bool = False
    """Whether it is AuxK's, and there only while features are dead."""

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
    encoder are there in half as many bytes, no chunk of features in float32, and gradients are made block by block."""
    gathers_rows: bool = True
    """Whether each process has rows of its own, which a feature group gathers."""
    vectors: int = 1
    """Split parameters that have one number for each feature, such as ``b_enc``."""
    k_aux: int = 0
    """Dead features of each row that AuxK trains, counted as if as many were dead; 0: none."""
    centers: bool = True
    """Whether ``b_dec`` is subtracted from what the encoder reads."""
    elementwise: bool = True
    """Whether the optimizer updates each number by itself, so that processes with the same ones share that."""

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
        numbers = 2 * self.parameters(mesh) + self.moments * self.updated(mesh)
        return numbers * _FLOAT + 2 * _LONG * self.d_sae / mesh.features

    def updated(self, mesh: Mesh) -> float:
        """Parameters that one process updates, and of which it keeps moments: of large ones those of some features."""
        large = self.split / mesh.features - self._small_split(mesh)
        if not self.elementwise or (self.d_sae / mesh.features) % mesh.data:
            large = 0
        return self.parameters(mesh) - large * (1 - 1 / mesh.data)

    def step_bytes(self, mesh: Mesh) -> float:
        """What a fast step takes beside that, when it takes most: see :meth:`held`."""
        return sum(self.held(mesh).values())

    def held(self, mesh: Mesh) -> dict[str, float]:
        """Bytes of the tensors that a fast step has at one time, by what they are; AuxK's are left out.

        On a CPU memory of products is kept from step to step, so that features, the rounded encoder and masks are there
        while gradients are made.
        """
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        chunk, group = min(rows, _CHUNK), self._group(mesh)
        # What others send of a gradient is received in the memory of a chunk's features.
        parts = self.updated(mesh) < self.parameters(mesh)
        received = (1 - 1 / mesh.data) * _FLOAT * own * max(self.d_in, self.d_out) if parts else 0
        found = {"inputs": _FLOAT * rows * self.d_in * (2 if self.centers else 1)}
        found["errors"] = _FLOAT * group * self.d_out
        if not self.screened:
            found["features of a chunk"] = max(_FLOAT * chunk * own, received) + 0.5 * _FLOAT * chunk * own
            return found | self._in_gradients(mesh)
        found["features of a chunk"] = max(2 * chunk * own, received) + chunk * own  # bounds in bfloat16, and a mask
        found["the rounded encoder"] = 2 * own * (self.d_in + 8)
        # While a chunk is looked at, of every 32 the largest is there in float32, five times.
        return found | max(
            {"bounds of a chunk": chunk * own * 5 * _FLOAT / 32},
            self._in_gradients(mesh),
            key=lambda one: sum(one.values()),
        )

    def _in_gradients(self, mesh: Mesh) -> dict[str, float]:
        """Of :meth:`held`, what is there while gradients are made."""
        rows, own, group = self.rows / mesh.data, self.d_sae / mesh.features, self._group(mesh)
        found = {"reconstructions": _FLOAT * rows * self.d_out}
        if self.k:
            made = min(own, _BLOCK) if self.screened else own
            found["gradients of a group"] = _FLOAT * made * max(self.d_in, self.d_out)
            found["active entries"] = _ENTRY * self._entries(mesh)
        if mesh.features > 1:  # small groups are kept until there are several
            several = min(rows, max(_CHUNK, own / 2))
            found["errors kept"] = _FLOAT * several * (self.d_out if several <= group else 2 * self.d_out + self.d_in)
        found["what others tell"] = sum(
            message.size * (self._processes(message, mesh) + (2 if message.what == "largest features" else 1))
            for message in self.messages(mesh)
            if message.gathers and not message.revives
        )
        return found

    def _entries(self, mesh: Mesh) -> float:
        """Active entries of a group of rows, those included that compete with others'."""
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        if self._competing == "all":
            return _EXCESS * self.k * rows / mesh.features
        return min(rows * self.k, max(_ENTRIES, _CHUNK * own * _FLOAT / 4 / _ENTRY))

    def _group(self, mesh: Mesh) -> float:
        """Rows of a group."""
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        if not self.k:
            return min(rows, _CHUNK)
        if self._competing == "all":
            return rows
        most = max(_ENTRIES, _CHUNK * own * _FLOAT / 4 / _ENTRY)
        return min(rows, max(most // (self.k * _CHUNK), 1) * _CHUNK)

    def bytes(self, mesh: Mesh) -> float:
        """Of one process, for the SAE and its steps."""
        return self.state_bytes(mesh) + self.step_bytes(mesh)

    def _small(self, mesh: Mesh) -> float:
        """Numbers of gradients that go together with counts."""
        return self._small_split(mesh) + (self.alike if self.alike < LARGE else 0)

    def _small_split(self, mesh: Mesh) -> float:
        """Those of parameters that have an axis of features."""
        own = self.d_sae / mesh.features
        if own * max(self.d_in, self.d_out) < LARGE:
            return self.split / mesh.features
        return self.vectors * own if own < LARGE else 0

    def messages(self, mesh: Mesh) -> list[Message]:
        """Those of one step, but for a few numbers, such as losses."""
        found, rows = [], self.rows / mesh.data
        if mesh.features > 1:
            if self.gathers_rows:
                found.append(Message("rows", "features", True, _FLOAT * self.rows / mesh.size * self.d_in))
            if self._competing == "features":
                found += _of_rows("largest features", rows, self.k, mesh.features)
            found.append(Message("reconstructions", "features", False, _FLOAT * rows * self.d_out))
            if self.centers:
                found.append(Message("gradient of b_dec", "features", False, _FLOAT * self.d_in))
            if self.k_aux:
                found += _of_rows("dead features", rows, self.k_aux, mesh.features, revives=True)
                found.append(Message("reconstructions by AuxK", "features", False, _FLOAT * rows * self.d_out, True))
        if mesh.data > 1:
            small = self._small(mesh)
            found.append(Message("gradients", "data", False, _FLOAT * (self.parameters(mesh) - small)))
            counts = _LONG * (self.d_sae / mesh.features + small)
            found.append(Message("firing counts and small gradients", "data", False, counts))
            if self.k_aux:
                found.append(Message("means for AuxK", "data", False, 2 * _FLOAT * self.d_out, True))
        if self._competing == "all":
            counts = _LONG * counts_sent(32, OF_ALL)
            for over in ("features", "data"):
                if getattr(mesh, over) > 1:
                    found.append(Message("counts of largest features", over, False, counts))
        return found

    @staticmethod
    def _processes(message: Message, mesh: Mesh) -> int:
        return mesh.data if message.over == "data" else mesh.features

    def sent_bytes(self, mesh: Mesh) -> float:
        """What each process sends in a step."""
        return sum(message.sent(self._processes(message, mesh)) for message in self.messages(mesh))

    def operations(self, mesh: Mesh) -> float:
        """Additions and multiplications of a step in products of matrices: the encoder meets all features, ``2 d_in``
        for each row and feature, and where ``k`` is 0 four more products do, as no feature need be zero."""
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        return 2 * rows * own * (self.d_in + (0 if self.k else 2 * (self.d_in + self.d_out)))

    def moved_bytes(self, mesh: Mesh) -> float:
        """What a step reads and writes besides: gradients made, read and written once more; of what is updated, weights
        and moments there and back, and gradients twice; features of each row, several times; rows of weights that
        active entries meet."""
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        moved = _FLOAT * (3 * self.parameters(mesh) + self.updated(mesh) * (2 + 2 * self.moments + 2))
        moved += rows * own * (3 * 2 + 3 if self.screened else 3 * _FLOAT)  # written, and looked at twice; and a mask
        moved += self.d_in * own * (2 * _FLOAT + 2) if self.screened else 0
        return moved + rows * self.k / mesh.features * _FLOAT * (2 * self.d_in + 3 * self.d_out)

    def seconds(self, mesh: Mesh, rates: Rates) -> float:
        """Of a step: products, what goes through memory, and messages, one after the other."""
        done = self.operations(mesh) / rates.flops + self.moved_bytes(mesh) / rates.memory
        return done + self.sent_bytes(mesh) / rates.links


def _of_rows(what: str, rows: float, k: int, parts: int, *, revives: bool = False) -> list[Message]:
    """How each row's ``k`` largest of so many ``parts`` of features are found: see
    :meth:`saekit.distributed.Share.among_largest`."""
    if (parts - 1) * k <= FEW:
        return [Message(what, "features", True, _FLOAT * rows * k, revives)]
    counts = _FLOAT * rows * counts_sent(32, OF_ROWS)
    return [
        Message(f"counts of {what}", "features", False, counts, revives),
        Message(f"counts of equal {what}", "features", True, _FLOAT * rows, revives),
    ]


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
