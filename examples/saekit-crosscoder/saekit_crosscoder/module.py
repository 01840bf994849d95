"""The mathematics of ``my_crosscoder``, for autograd, and the same step by the kernels of saekit."""

import torch

from saekit import SAE, StepOutput
from saekit.abilities import SparseActivation
from saekit.kernels import FastStep, SparseKernel, SparsityPenalty, active_groups, screen_for, values_of
from saekit.sae import sparsity_penalty, squared_errors


class CrosscoderKernel(SparseKernel):
    """A step without autograd, of active features alone."""

    def refuses_options(self, sae, *, training):
        return None if isinstance(sae.activation, SparseActivation) else "the activation declares no sparse support"

    def groups(self, sae, rows, workspace):
        encoder = self.encoder(sae, workspace)
        return active_groups(encoder, sae.centered(rows), sae.activation, screen=screen_for(encoder))

    def step(self, sae, x, step, workspace):
        coefficient, norms = sae.config.l1_at(step.step), sae.site_norms()
        total = sum(norms.values())
        fast = FastStep(sae, x, workspace, target=step.target)
        penalty = SparsityPenalty.of(x, len(x), coefficient, 1.0, total, learns=sae.W_dec.requires_grad)

        def to_pre(gradient, features, rows):
            return sae.activation.pre_gradient(penalty.add_gradient(gradient, features), values_of(features))

        for start, features in self.groups(sae, x, workspace):
            penalty.count(features)
            fast.add(start, features, to_pre)
        result = fast.finish(
            {"mse_loss": fast.mse, "l1_loss": penalty.value}, weights=(1, coefficient),
            coefficients={"l1_coefficient": coefficient}, metrics=sae.shares(norms),
        )  # fmt: skip
        if sae.W_dec.grad is not None:  # of the norm of each site's part of a row
            gradients, parts = sae.ports.split_target(sae.W_dec.grad), sae.ports.split_target(sae.W_dec)
            for name, norm in norms.items():
                gradients[name].addcmul_(parts[name], (penalty.to_norms / norm).where(norm > 0, 0)[:, None])
        return result


class Crosscoder(SAE):
    """See the package."""

    step_kernels = (CrosscoderKernel(),)

    def site_norms(self):
        """The norms ``[d_sae]`` of the decoder's rows, by the name of the site."""
        return {name: part.norm(dim=1) for name, part in self.ports.split_target(self.W_dec).items()}

    def shares(self, norms):
        """Of each site, its part of the decoders' norms, as a mean over the features: metrics of this architecture."""
        total = sum(norms.values())
        return {f"crosscoder/share_of_{name}": (norm / total).nanmean().detach() for name, norm in norms.items()}

    def losses(self, x, step):
        coefficient, norms = self.config.l1_at(step.step), self.site_norms()
        features = self.activation(self.pre_activations(x))
        output = self.reconstruction(features)
        mse = squared_errors(output, step.target_for(x)).sum(-1).mean()
        penalty = sparsity_penalty(features, weights=torch.stack(tuple(norms.values())).sum(0))
        return StepOutput(
            loss=mse + coefficient * penalty,
            losses={"mse_loss": mse.detach(), "l1_loss": penalty.detach()},
            output=output.detach(),
            fired=(features.detach() > 0).sum(0),
            coefficients={"l1_coefficient": coefficient},
            metrics=self.shares(norms),
        )
