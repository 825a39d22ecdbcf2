"""Rebuild the built-in base: `python jobs/pretrain_builtin.py --out ptuning/builtin/base`."""

import argparse
from pathlib import Path

import torch
from pretraining.pretrain import Recipe, pretrain


def main() -> None:
    """Parse the command line and pretrain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and its card")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps of 4,096 tokens; few for a test")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="seed of the corpus and the weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--tracking-uri", help="MLflow tracking URI, for example sqlite:////tmp/mlflow.db")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = pretrain(args.out, Recipe(seed=args.seed, steps=args.steps), args.device, args.tracking_uri)
    print(", ".join(f"{name} {value:.6g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
