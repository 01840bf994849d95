"""What an SAE architecture promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.testing.checks.check import Checks, NotTried, Subject, must
from saekit.testing.checks.dictionaries import (
    ONE,
    ROWS,
    copied,
    inputs,
    made,
    methods,
    must_be_one_step,
    rows,
    step_input,
    stepped,
    takes,
    uninitialized,
    with_factors,
)
from saekit.testing.checks.kept_dictionaries import KEPT
from saekit.testing.checks.kernel_ways import must_infer_alike, must_step_alike
from saekit.testing.checks.numbers import must_agree, must_be_equal, seeded
from saekit.testing.checks.spread_dictionaries import SPREAD
from saekit.transforms import Affine
from saekit.values import Ports, StepOutput

if TYPE_CHECKING:
    from saekit.pretrained.sae import SAE

CHECKS = Checks()
_EXACT = 1e-9


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built as a :class:`saekit.SAE` of the type of its options."""
    import torch

    from saekit.pretrained.sae import SAE

    for dtype in ("float64", "float32", "bfloat16"):
        sae = uninitialized(subject, dtype=dtype)
        must(isinstance(sae, SAE), f"it builds a {type(sae).__name__}, which does not derive from saekit.SAE")
        must(sae.dtype == getattr(torch, dtype), f"with dtype {dtype} it is in {sae.dtype}")
        must(sae.device.type == "cpu", f"it is built on {sae.device}; the kernel moves it")
        sizes = (sae.d_in, sae.d_out, sae.d_sae, sae.ports)
        must(sizes == (6, 6, sae.config.d_sae, ONE), f"its d_in, d_out, d_sae and ports are {sizes}")


@CHECKS.add
def table(subject: Subject) -> None:
    """Its table has all of its parameters, with their shapes; its state is buffers that can be saved."""
    import torch

    for where, ports in takes(subject):
        sae = uninitialized(subject, ports)
        listed = {entry.name: entry for entry in sae.table}
        for name, value in sae.named_parameters():
            if name.startswith("activation."):
                continue
            must(name in listed, f"{name} is a parameter that its table (parameters_of) does not have ({where})")
            shape = sae.table.shape(name)
            must(
                tuple(value.shape) == shape, f"{name} has the shape {list(value.shape)}, and by its table {list(shape)}"
            )
        there = {name for name, _ in sae.named_parameters()}
        lost = [name for name, entry in listed.items() if not entry.optional and name not in there]
        must(not lost, f"its table has {', '.join(lost)}, which the module does not ({where})")
        saved = sae.state_dict()
        for name, buffer in sae.named_buffers():
            must(name in saved, f"the buffer {name} is not persistent, so that it would be lost")
            must(buffer.is_floating_point(), f"the buffer {name} holds {buffer.dtype}, expected floating-point numbers")
        odd = [name for name, value in saved.items() if not isinstance(value, torch.Tensor)]
        must(not odd, f"its state {', '.join(odd)} is no tensor: register it as a buffer")


@CHECKS.add
def initialization(subject: Subject) -> None:
    """Starting values are finite, and the same for the same seed."""
    from saekit.sae.build import initialize

    found = []
    for _ in range(2):
        sae = uninitialized(subject)
        initialize(sae, seeded(), rows(ONE)[0])
        found.append({name: value.detach().clone() for name, value in sae.named_parameters()})
    for name, value in found[0].items():
        must(value.isfinite().all(), f"{name} starts with numbers that are not finite")
    must_be_equal("starting values of the same seed", found[1], found[0])


@CHECKS.add
def inference(subject: Subject) -> None:
    """It takes ``[..., d_in]`` of any type and gives ``[..., d_sae]`` and ``[..., d_out]``; in an SAE, as it was."""
    import torch

    for where, ports in takes(subject):
        sae = made(subject, ports)
        x = inputs(sae)
        others = [] if sae.reads_sequences else [x[0], x.reshape(4, -1, ports.d_in)]
        for given in (x, x[:1], x.float(), *others):
            before = given.clone()
            output, features = sae(given), sae.encode(given)
            wide = (*given.shape[:-1], ports.d_out)
            must(output.shape == wide, f"outputs of {list(given.shape)} have the shape {list(output.shape)} ({where})")
            must(output.dtype == given.dtype, f"of {given.dtype} it makes outputs in {output.dtype}")
            must(features.shape == (*given.shape[:-1], sae.d_sae), f"features have the shape {list(features.shape)}")
            must(output.isfinite().all(), f"outputs are not finite ({where})")
            must_be_equal("what it was given, afterwards,", given, before)
        decoded = sae.decode(sae.encode(x))
        wide = (*x.shape[:-1], ports.d_out)
        must(decoded.shape == wide, f"decode gives the shape {list(decoded.shape)} ({where})")
        if sae.bypass(x) is None:
            must_agree("decode(encode(x)), and what it is called with x,", decoded, sae(x), _EXACT)
        x.requires_grad_()
        sae(x).square().sum().backward()
        must(x.grad is not None and bool(x.grad.any()), "outputs have no gradient to inputs")
        with torch.no_grad():
            must_agree(
                "outputs where nobody wants a gradient", sae(x), sae(x.detach().clone().requires_grad_()), _EXACT
            )


@CHECKS.add
def step(subject: Subject) -> None:
    """A step reports what :class:`saekit.StepOutput` says, leaves finite gradients, and changes nothing else."""
    for where, ports in takes(subject):
        fresh = made(subject, ports)
        for n, number, dead in ((ROWS, 0, 0.0), (ROWS, 3, 0.4), (ROWS, 9, 1.0), (1, 3, 0.0)):
            sae = copied(fresh)
            before = {name: value.detach().clone() for name, value in sae.named_parameters()}
            found = stepped(sae, n=n, step=number, dead=dead)
            _must_be_report(found, sae, n)
            for name, value in sae.named_parameters():
                gradient = value.grad
                if gradient is not None:
                    must(gradient.shape == value.shape, f"the gradient of {name} has the shape {list(gradient.shape)}")
                    must(gradient.isfinite().all(), f"the gradient of {name} is not finite ({where}, {n} rows)")
                must_be_equal(f"{name} after a step, which is before its update,", value.detach(), before[name])


def _must_be_report(found: StepOutput, sae: SAE, n: int) -> None:
    must(isinstance(found, StepOutput), f"it returns {type(found).__name__}, expected a StepOutput")
    must(found.loss.ndim == 0 and found.loss.isfinite(), f"its loss is {found.loss}, expected a finite scalar")
    shape = list(found.output.shape)
    must(shape == [n, sae.d_out], f"its output has the shape {shape}, expected {[n, sae.d_out]}")
    must(not found.output.requires_grad, "its output is not detached")
    must(list(found.fired.shape) == [sae.d_sae], f"its fired has the shape {list(found.fired.shape)}")
    counted = found.fired.double()
    must(((counted >= 0) & (counted <= n)).all(), "its fired are not numbers of rows")
    for what in ("losses", "coefficients", "metrics"):
        for name, value in getattr(found, what).items():
            must(isinstance(name, str), f"{what} has the name {name!r}")
            scalar = getattr(value, "ndim", 0) == 0 and not getattr(value, "requires_grad", False)
            must(scalar, f"{name} of its {what} is no detached scalar")


@CHECKS.add
def draws(subject: Subject) -> None:
    """A step is the same for the same: what it draws is from ``step.generator``."""
    sae = made(subject)
    one, other = copied(sae), copied(sae)
    must_be_one_step(one, stepped(one, dead=0.4), other, stepped(other, dead=0.4), tolerance=0)


@CHECKS.add
def targets(subject: Subject) -> None:
    """Steps learn ``step.target`` where one is given, and ``x`` itself where none is."""
    sae = made(subject)
    x, _ = rows(ONE)
    plain, given, other = copied(sae), copied(sae), copied(sae)
    expected = plain.training_step(x, step_input(plain))
    found = given.training_step(x, step_input(given, target=x.clone()))
    must_be_one_step(given, found, plain, expected, where=" with x as the target")
    moved = other.training_step(x, step_input(other, target=x + 3))
    must((moved.loss - expected.loss).abs() > 1e-6, "its loss is the same whatever step.target is")


@CHECKS.add
def kernels(subject: Subject) -> None:
    """Every step kernel does what autograd does of ``losses``: reports, gradients and state, to 1e-9 in float64."""
    from saekit.kernels.kernel import Served

    tried, refused = 0, ["it has none"]
    for where, ports in takes(subject):
        sae = made(subject, ports)
        for kernel in sae.step_kernels:
            fast: Any = copied(sae, "fast")
            fast.served_by, fast.step_kernels = Served(), (kernel,)
            reason = fast.why_reference()
            if reason is not None:
                refused.append(f"{kernel.name}: {reason}")
                continue
            tried += 1
            must_step_alike(fast, sae, f"{where}, {kernel.name}")
            must_infer_alike(fast, sae, f"{where}, {kernel.name}")
    if not tried:
        raise NotTried("; ".join(dict.fromkeys(refused[-4:])))


@CHECKS.add
def unit_rows(subject: Subject) -> None:
    """After an update, rows that its table says have norm 1 have it; other parameters are as the update left them."""
    import torch

    sae = made(subject)
    stepped(sae)
    sae.before_update()
    with torch.no_grad():
        for value in sae.parameters():
            if value.grad is not None:
                value.sub_(0.01 * value.grad)
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    sae.after_update()
    for entry in sae.table:
        value = getattr(sae, entry.name)
        if value is not None and entry.unit_rows:
            must_agree(f"norms of rows of {entry.name}", value.norm(dim=-1), torch.ones(value.shape[:-1]), _EXACT)
        elif value is not None and type(sae).after_update is _of_the_kernel():
            must_be_equal(f"{entry.name} after after_update", value.detach(), before[entry.name])


def _of_the_kernel() -> Any:
    from saekit.pretrained.sae import SAE

    return SAE.after_update


@CHECKS.add
def folding(subject: Subject) -> None:
    """With an activation scale folded in it does on ``x`` what it did on ``scale · x``, also with one for each port."""
    import torch

    refused = []
    for where, ports in takes(subject):
        for each in (False, True):
            sae = made(subject, ports)
            x = inputs(sae)
            scale, target = _scales(ports, each)
            expected = sae(x * scale) / target
            try:
                sae.fold_activation_scale(scale, None if ports.same and not each else target)
            except ValueError as error:
                if not isinstance(scale, torch.Tensor):
                    raise
                refused.append(f"{where}: {error}")
                continue
            must_agree(f"outputs after a scale was folded in ({where})", sae(x), expected, _EXACT)


def _scales(ports: Ports, each: bool) -> tuple[Any, Any]:
    """A factor for inputs and one for targets: numbers, or where each port has one of its own vectors."""
    import torch

    if not each:
        return (0.4, 0.4) if ports.same else (0.4, 1.7)
    numbers = {name: 0.4 + 0.3 * index for index, name in enumerate({**ports.inputs, **ports.targets})}
    vectors = [
        torch.cat([torch.full((width,), numbers[name], dtype=torch.float64) for name, width in widths.items()])
        for widths in (ports.inputs, ports.targets)
    ]
    return vectors[0], vectors[1]


@CHECKS.add
def mapping(subject: Subject) -> None:
    """With an affine map folded in it does on ``x`` what it did on ``(x − mean) matrix``, features included, or it
    refuses with a :class:`saekit.ConfigError`."""
    from saekit.errors import ConfigError

    refused = []
    for where, ports in takes(subject):
        sae = made(subject, ports)
        x = inputs(sae)
        read = _map(ports.d_in, 1)
        written = read if ports.same else _map(ports.d_out, 2)
        z = (x - read.mean) @ read.matrix
        features, output = sae.encode(z), sae(z) @ written.inverse + written.mean
        try:
            sae.fold_affine(read, None if ports.same else written)
        except ConfigError as error:
            refused.append(str(error))
            continue
        must_agree(f"features after a map was folded in ({where})", sae.encode(x), features, _EXACT)
        must_agree(f"outputs after a map was folded in ({where})", sae(x), output, _EXACT)
    if refused:
        raise NotTried(f"it takes no map: {refused[0]}")


def _map(d: int, seed: int) -> Affine:
    import torch

    matrix = torch.randn(d, d, generator=seeded(seed), dtype=torch.float64) / 4 + torch.eye(d, dtype=torch.float64)
    mean = torch.randn(d, generator=seeded(seed + 9), dtype=torch.float64)
    return Affine(mean, matrix, torch.linalg.inv(matrix))


@CHECKS.add
def learn_only(subject: Subject) -> None:
    """Fine-tuning: what its method trains gets autograd's gradient, everything else none, and stays as it is."""
    plain = made(subject)
    cases: dict[str, tuple[SAE, frozenset[str]]] = {
        f"method {method}": (sae := with_factors(copied(plain), method), sae.table.trained_by(method))
        for method in methods(plain)
    }
    cases |= {f"{name} alone": (plain, frozenset([name])) for name, _ in plain.named_parameters()}
    for where, (fresh, names) in cases.items():
        known = [name for name in names if getattr(fresh, name, None) is not None]
        must(known, f"there is nothing that {where} trains")
        one, whole = copied(fresh, "fast"), copied(fresh, "reference")
        for value in whole.parameters():
            value.requires_grad_(True)
        one.learn_only(names)
        if not any(value.requires_grad for value in one.parameters()):
            continue
        _must_learn(one, whole, set(known), where)


def _must_learn(one: SAE, whole: SAE, names: set[str], where: str) -> None:
    stepped(whole)
    right = dict(whole.named_parameters())
    if all(right[name].grad is None for name in names):
        return
    stepped(one)
    before = {name: value.detach().clone() for name, value in one.named_parameters()}
    one.before_update()
    one.after_update()
    for name, value in one.named_parameters():
        if name not in names:
            must(value.grad is None, f"{name} has a gradient where it does not learn ({where})")
            must_be_equal(f"{name}, which does not learn ({where}),", value.detach(), before[name])
    again, reference = copied(one), copied(one, "reference")
    for sae in (again, reference):
        sae.zero_grad(set_to_none=True)
    must_be_one_step(again, stepped(again), reference, stepped(reference), where=f" ({where})")


CHECKS.extend(SPREAD)
CHECKS.extend(KEPT)
