"""What a training step takes on many processes: memory and messages of each, and time at given rates; without torch.

What is counted is what saekit does (see ``docs/scaling.md``, which says how it was checked).  A process of a mesh
``data × features`` has ``1 / features`` of whatever has an axis of features, all of the rest, and ``rows / data`` rows.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from saekit.distributed.sizes import FEW, LARGE, OF_ALL, OF_ROWS, counts_sent, most_entries

__all__ = ["Job", "Mesh", "Message", "Rates", "advised", "meshes"]

_LONG = 8
_CHUNK = 1024
"""Rows at a time of which a fast step holds all features: :data:`saekit.kernels.encoder.CHUNK`."""
_PROBE = 256
"""Rows that show where the largest of a batch begin: :data:`saekit.kernels.encoder.PROBE`."""
_ENTRIES, _ENTRY = 1 << 18, 64
"""Entries of a sparse group, and about the bytes that one takes with all that is made of it."""
_EXCESS = 1.5
"""Times as many candidates as are wanted where entries compete over the whole batch."""
_BLOCK = 2048
"""Features at a time of which CPUs make weight gradients."""
_PLAIN = 6
"""Tensors of features of a whole batch that a step by autograd has at one time: measured, see docs/recipes.md."""
_ROUNDED = {"bfloat16": (2, 8), "int8": (1, 32)}
"""Of a first look: bytes of a number of the rounded encoder, and about how many more it has for each feature."""


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
    """An SAE in training, as far as costs depend on it."""

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
    screened: str | None = None
    """What a first look finds active features in, as on CPUs, ``bfloat16`` or ``int8``: then a rounded copy of the
    encoder is there, bounds of a chunk take the place of its features, and gradients are made block by block.  None:
    there is none."""
    fast: bool = True
    """Whether a fast kernel makes the steps; else autograd does, which has features of all rows, several times."""
    beside: float = 0
    """Numbers that a kernel holds beside what every one does, for all rows."""
    on_gpu: bool = False
    """Whether its device is one that is not waited for: then one process finds what competes over a batch among the
    features of all rows, and weight gradients are made of all features at once."""
    rounded: bool = False
    """Whether encoder and decoder are copied in bfloat16, for products in that."""
    itemsize: int = 4
    """Bytes of a number."""
    undivided: float = 0
    """Of the parameters that are split, numbers in large ones whose features do not lie one after the other in memory,
    as in ``W_enc`` in float64: where batches are split, every process updates all of these."""
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
    leaves_weights: bool = False
    """Whether a kernel lets processes make the gradients of ``W_enc`` and ``W_dec`` of each other's rows."""

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
        if self.gives_rows(mesh):  # of others' features, gradients have a place, of which no page is ever touched
            numbers -= (1 - 1 / mesh.data) * self.d_sae / mesh.features * (self.d_in + self.d_out)
        return numbers * self.itemsize + 2 * _LONG * self.d_sae / mesh.features

    def updated(self, mesh: Mesh) -> float:
        """Parameters that one process updates, and of which it keeps moments: of large ones those of some features."""
        large = max(self.split / mesh.features - self._small_split(mesh) - self.undivided / mesh.features, 0)
        if not self.elementwise or (self.d_sae / mesh.features) % mesh.data:
            large = 0
        return self.parameters(mesh) - large * (1 - 1 / mesh.data)

    def gives_rows(self, mesh: Mesh) -> bool:
        """Whether processes that share a batch give each other their rows in place of gradients, while nothing is
        revived."""
        if not (self.leaves_weights and self.k and mesh.data > 1 and self.updated(mesh) < self.parameters(mesh)):
            return False
        rows, own, width = self.rows // mesh.data, self.d_sae // mesh.features, self.d_in + self.d_out
        most = most_entries(rows, mesh.data, own, width, self.itemsize)
        return not (self.on_gpu or self.undivided or self.k_aux) and self._given(mesh) <= most

    def _given(self, mesh: Mesh) -> float:
        """Active entries of one process that the others are given."""
        return self.rows / mesh.data * self.k / mesh.features

    def step_bytes(self, mesh: Mesh) -> float:
        """What a step takes beside that, when it takes most: see :meth:`held`."""
        return sum(self.held(mesh).values())

    def held(self, mesh: Mesh) -> dict[str, float]:
        """Bytes of the tensors that a step has at one time, by what they are.

        On a CPU memory of products is kept from step to step, so that features, the rounded encoder and masks are there
        while gradients are made.
        """
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        found = {"beside": self.itemsize * self.beside / mesh.data} if self.beside else {}
        if self.rounded:
            found["rounded weights"] = 2 * own * (self.d_in + self.d_out)
        if not self.fast:
            found["inputs and reconstructions"] = self.itemsize * 4 * rows * (self.d_in + self.d_out)
            return found | {"features of all rows": self.itemsize * _PLAIN * rows * own}
        found["inputs"] = self.itemsize * rows * self.d_in * (2 if self.centers else 1)
        if self.on_gpu and self._competing == "all" and mesh.size == 1:  # gone when gradients are made
            alone = {"features of all rows": self.itemsize * rows * own, "active entries": _ENTRY * self.k * rows}
        else:
            alone = {}
        # What others send of a gradient is received in the memory of a chunk's features.
        parts = self.updated(mesh) < self.parameters(mesh) and not self.gives_rows(mesh)
        received = (1 - 1 / mesh.data) * self.itemsize * own * max(self.d_in, self.d_out) if parts else 0
        chunk = min(rows, _CHUNK) * own
        if self.screened is None or rows <= _PROBE:
            # Where many features are active, or on GPUs, half as many gradients are there, too.
            half = 0 if self.k and not self.on_gpu else 0.5 * self.itemsize * chunk
            kept, looking = {"features of a chunk": max(self.itemsize * chunk, received) + half}, {}
        else:
            size, more = _ROUNDED[self.screened]
            bounds = 2 if self.screened == "bfloat16" else 4
            kept = {"features of a chunk": max(bounds * chunk, received) + chunk}  # bounds, and a mask
            kept["the rounded encoder"] = size * own * (self.d_in + more)
            # While a chunk is looked at, of every 32 the largest is there in float32, five times.
            looking = kept | {"bounds of a chunk": chunk * 5 * 4 / 32}
        if self._competing == "all" and not alone and self.on_gpu:
            # As many as the whole batch has, since all may be own ones; and what they are compared by.
            looking = kept | {"candidates": _ENTRY * min(self.k * self.rows, rows * own)}
        elif self._competing == "all" and not alone:
            # Of the first rows that half which is above zero, by its places, shows what the batch's largest reach.
            looking = kept | {"features of the first rows": min(rows, _PROBE) * own * (2 + (16 + self.itemsize) / 2)}
        errors = {"errors": self.itemsize * self._group(mesh) * self.d_out}
        turns = [alone, errors | looking, errors | kept | self._in_gradients(mesh), kept | self._in_auxk(mesh)]
        return found | max(turns, key=lambda one: sum(one.values()))

    def _in_gradients(self, mesh: Mesh) -> dict[str, float]:
        """Of :meth:`held`, what is there while gradients are made."""
        rows, own, group = self.rows / mesh.data, self.d_sae / mesh.features, self._group(mesh)
        found = {"reconstructions": self.itemsize * rows * self.d_out}
        if self.k:
            made = own if self.on_gpu else min(own, 2 * _BLOCK)  # one is still there when the next is made
            found["gradients of a group"] = self.itemsize * made * max(self.d_in, self.d_out)
            found["active entries"] = _ENTRY * self._entries(mesh)
        if mesh.features > 1:  # small groups are kept until there are several
            several = min(rows, max(_CHUNK, own / 2))
            width = self.d_out if several <= group else 2 * self.d_out + self.d_in
            found["errors kept"] = self.itemsize * several * width
        if self.gives_rows(mesh):  # those of others lie in the memory of a chunk's features
            found["rows kept"] = self.itemsize * rows * (self.d_in + 2 * self.d_out)
            found["entries of all"] = (mesh.data * (8 + 2 * self.itemsize) + _ENTRY) * self._given(mesh)
        found["what others tell"] = sum(
            message.size * (self._processes(message, mesh) + (2 if message.what == "largest features" else 1))
            for message in self.messages(mesh)
            if message.gathers and not message.revives and message.over == "features"
        )
        return found

    def _in_auxk(self, mesh: Mesh) -> dict[str, float]:
        """The same for AuxK, which comes after that: of the dead features weights, gradients and what is looked at."""
        if not self.k_aux:
            return {}
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        chunk, dead = min(rows, _CHUNK), min(self.k_aux, own)
        found = {"reconstructions": self.itemsize * rows * self.d_out}
        if self.on_gpu:  # among all features, of which those that are alive are passed over
            found["features that AuxK compares"] = self.itemsize * chunk * own
            found["entries of AuxK"] = _ENTRY * chunk * dead
            return found
        found["dead features"] = self.itemsize * dead * (2 * (self.d_in + self.d_out) + 3 * chunk)
        found["errors of AuxK"] = 2 * self.itemsize * chunk * self.d_out
        return found

    def _entries(self, mesh: Mesh) -> float:
        """Active entries of a group of rows, those included that compete with others'."""
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        if self._competing == "all":
            return _EXCESS * self.k * rows / mesh.features
        return min(rows * self.k, max(_ENTRIES, _CHUNK * own * self.itemsize / 4 / _ENTRY))

    def _group(self, mesh: Mesh) -> float:
        """Rows of a group."""
        rows, own = self.rows / mesh.data, self.d_sae / mesh.features
        if not self.k:
            return min(rows, _CHUNK)
        if self._competing == "all":
            return rows
        most = max(_ENTRIES, _CHUNK * own * self.itemsize / 4 / _ENTRY)
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
                found.append(Message("rows", "features", True, self.itemsize * self.rows / mesh.size * self.d_in))
            if self._competing == "features":
                found += _of_rows("largest features", rows, self.k, mesh.features, self.itemsize)
            found.append(Message("reconstructions", "features", False, self.itemsize * rows * self.d_out))
            if self.centers:
                found.append(Message("gradient of b_dec", "features", False, self.itemsize * self.d_in))
            if self.k_aux:
                found += _of_rows("dead features", rows, self.k_aux, mesh.features, self.itemsize, revives=True)
                found.append(
                    Message("reconstructions by AuxK", "features", False, self.itemsize * rows * self.d_out, True)
                )
        if mesh.data > 1:
            small = self._small(mesh)
            summed, width = self.parameters(mesh) - small, self.d_in + self.d_out
            if self.gives_rows(mesh):
                weights, entry = self.d_sae / mesh.features * width, 8 + 2 * self.itemsize
                given = self.itemsize * rows * width + entry * self._given(mesh)
                found.append(Message("rows and gradients to them", "data", True, given))
                # Each gives its part: half of what a sum of all would be.
                found.append(Message("updated weights", "data", False, self.itemsize * weights / 2))
                summed -= weights
            if summed or not self.gives_rows(mesh):
                found.append(Message("gradients", "data", False, self.itemsize * summed))
            counts = _LONG * (self.d_sae / mesh.features + small)
            found.append(Message("firing counts and small gradients", "data", False, counts))
            if self.k_aux:
                found.append(Message("means for AuxK", "data", False, 2 * self.itemsize * self.d_out, True))
        if self._competing == "all":
            counts = _LONG * counts_sent(8 * self.itemsize, OF_ALL)
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
        moved = self.itemsize * (3 * self.parameters(mesh) + self.updated(mesh) * (2 + 2 * self.moments + 2))
        looked_at = self.itemsize if self.screened is None else (3 if self.screened == "bfloat16" else 5)  # and a mask
        moved += 3 * looked_at * rows * own  # written, and looked at twice
        if self.screened is not None:
            moved += self.d_in * own * (2 * self.itemsize + _ROUNDED[self.screened][0])
        return moved + rows * self.k / mesh.features * self.itemsize * (2 * self.d_in + 3 * self.d_out)

    def seconds(self, mesh: Mesh, rates: Rates) -> float:
        """Of a step: products, what goes through memory, and messages, one after the other."""
        done = self.operations(mesh) / rates.flops + self.moved_bytes(mesh) / rates.memory
        return done + self.sent_bytes(mesh) / rates.links


def _of_rows(what: str, rows: float, k: int, parts: int, itemsize: int, *, revives: bool = False) -> list[Message]:
    """How each row's ``k`` largest of so many ``parts`` of features are found: see
    :meth:`saekit.distributed.Share.among_largest`."""
    if (parts - 1) * k <= FEW:
        return [Message(what, "features", True, itemsize * rows * k, revives)]
    counts = 4 * rows * counts_sent(8 * itemsize, OF_ROWS)
    return [
        Message(f"counts of {what}", "features", False, counts, revives),
        Message(f"counts of equal {what}", "features", True, 4 * rows, revives),
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
