"""What a training step of locked experts costs, counted beside that of the original's."""

import torch
from tiny import tiny_model

from dlr_lock import backend
from dlr_lock.audit.meters import count_step
from dlr_lock.runtime import DLRExperts, DLRSpec, ExpertsSpec


def test_a_step_through_experts_chains_of_their_size_is_longer_and_saves_more() -> None:
    model = tiny_model("mixtral")
    stock = model.model.layers[0].mlp.experts
    stock.config._experts_implementation = "eager"  # of grouped products torch counts no FLOPs
    own = sum(p.numel() for p in stock.parameters()) // 4
    chains = DLRExperts(ExpertsSpec(DLRSpec.of_params(64, own, depth=12), 4))
    chains.assign({name: torch.randn_like(p) / 8 for name, p in chains.named_parameters()})
    chains.requires_grad_()
    x, index, weight = torch.randn(256, 64), torch.randint(4, (256, 2)), torch.rand(256, 2)
    with backend("naive"):
        before, after = (
            count_step(lambda x, module=module: module(x, index, weight), x, [*module.parameters()])
            for module in (stock, chains)
        )
    assert 1 <= after.flops / before.flops < 1.4  # about as many products, in many more dependent steps
    assert after.dependent > 4 * before.dependent and after.saved > 1.8 * before.saved
