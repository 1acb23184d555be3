"""The same with Accelerate: `attach` to the torch optimizer before `prepare` wraps it.

pip install accelerate
python examples/with_accelerate.py --smoke
accelerate launch examples/with_accelerate.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from plain_pytorch import digits
from torch.utils.data import DataLoader

import nfnets


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps: does everything work here?")
    args = parser.parse_args(argv)
    set_seed(0)
    accelerator = Accelerator(cpu=args.smoke, gradient_accumulation_steps=2)
    train, test = digits()

    bn = nfnets.create_model("bn_resnet20_cifar", num_classes=10, in_chans=1)
    model = nfnets.convert(bn, train.tensors[0][:64], batch_size=32)
    groups = nfnets.param_groups(model, lr=0.1, weight_decay=5e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    # Accelerate's wrapper runs no hooks, the optimizer inside does: once per real step, on accumulated gradients.
    # The processes count by themselves, the accumulated batches do not.
    clipping = nfnets.attach(optimizer, model, accumulate=2).clipping

    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    tests = DataLoader(test, batch_size=120)
    model, optimizer, loader, tests = accelerator.prepare(model, optimizer, loader, tests)
    with nfnets.probe(model, every=50, agc=clipping) as probe:
        for epoch in range(1 if args.smoke else 12):
            model.train()
            for step, (x, y) in enumerate(loader):
                if args.smoke and step == 4:
                    break
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            accelerator.print(f"epoch {epoch}: loss {loss:.3f}, clipped {float(clipping.stats.fraction):.1%}")
    report = probe.report()  # merged over the ranks: a collective call
    accelerator.print(report.check())

    model.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in tests:
            guess, truth = accelerator.gather_for_metrics((model(x).argmax(1), y))
            right, total = right + int((guess == truth).sum()), total + len(truth)
    accelerator.print(f"test accuracy {right / total:.1%}; {clipping.stats.steps} steps were clipped")
    return right / total


if __name__ == "__main__":
    main()
