"""AdamW with torch's fused kernel and FusedAdam's state layout."""

import torch
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """AdamW that keeps one integer `step` in each parameter group, as apex's and TE's FusedAdam do.

    Megatron-Core's distributed optimizer saves, reshards and resumes that layout rightly; torch's own, a
    `step` tensor in each parameter's state, it resumes with one tensor shared by all parameters, which
    then counts every update once per parameter (docs/decisions.md). The arithmetic is torch's.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ):
        if not adam_w_mode:
            raise ValueError(
                "Adam: adam_w_mode=False (weight decay as part of the gradient) is not supported"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            done = group.get("step", 0)
            group["step"] = done + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # The kernel counts up one tensor a parameter, on the parameter's device.
                list(torch.full((len(params),), float(done), device=params[0].device).unbind()),
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
