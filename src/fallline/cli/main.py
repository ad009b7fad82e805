"""The `fallline` command. Each command's work is in a module of its own, imported when it is asked for."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import FalllineError, InputError, nearest

EPILOG = (
    "Exit codes: 0 done, 2 bad input, 3 not-finite loss or gradient, 4 storage failed, 130/143 interrupted and saved."
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="fallline",
        description="Train and adapt language models with recent gradient methods, and see which is really better.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"fallline {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="one run: progress, metrics, checkpoints, exact resume",
        description="Train as a recipe says: fallline train recipes/tiny.yaml optimizer=scale optimizer.lr=2e-3",
        epilog=EPILOG,
    )
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the folder of a run")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="replaces what the recipe says")
    train.add_argument("--resume", action="store_true", help="continue the run in out= from its newest good checkpoint")
    train.add_argument("--print-recipe", action="store_true", help="show the resolved recipe and stop")
    train.add_argument("--force", action="store_true", help="begin even if memory will not suffice")
    train.add_argument("--quiet", action="store_true", help="no progress")

    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="the same recipe once per choice; a report of which is better",
        description="Train a recipe once per choice and seed, each run in its own process, and report which is better: "
        "fallline compare recipes/tiny.yaml --over optimizer=adamw,scale --seeds 3 --tune optimizer.lr=1e-4:1e-1",
        epilog=EPILOG,
    )
    compare.add_argument("recipe", metavar="RECIPE", help="a YAML file, or with --resume the folder of a comparison")
    compare.add_argument("overrides", metavar="key=value", nargs="*", help="replaces what the recipe says, for all")
    compare.add_argument(
        "--over",
        metavar="key=a,b",
        action="append",
        default=[],
        help="what the choices differ in; several are combined each with each; key=all takes the catalogue",
    )
    compare.add_argument("--seeds", type=int, metavar="N", help="runs of each choice (default: 1)")
    compare.add_argument(
        "--tune",
        metavar="key=low:high[:n]",
        help="tune this for each choice: n trials, or two a decade and one more, on a seed of their own",
    )
    compare.add_argument(
        "--equal",
        choices=("tokens", "time", "memory"),
        help="what is held equal (default: tokens)",
    )
    compare.add_argument("--out", metavar="FOLDER", help="where it goes (default: runs/compare-RECIPE-NUMBER)")
    compare.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="runs at a time (default: 1); time is measured before"
    )
    compare.add_argument("--resume", action="store_true", help="go on with the comparison in --out, or in RECIPE")
    compare.add_argument("--force", action="store_true", help="measure and run even what memory will not suffice for")
    compare.add_argument("--quiet", action="store_true", help="no progress")

    plan = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="will it fit, and what else would",
        description="Forecast the memory of training a model, without its weights: fallline plan "
        "meta-llama/Llama-3.1-8B --memory 24GiB --length 2048",
        epilog=EPILOG,
    )
    plan.add_argument("model", metavar="MODEL", help="tiny … 7b, a 🤗 folder or hub id, or the folder of a run")
    plan.add_argument("--memory", metavar="SIZE", help="such as 24GiB (default: what is free here)")
    plan.add_argument("--length", type=int, default=1024, metavar="N", help="tokens in a row (default: 1024)")
    plan.add_argument("--batch", type=int, default=8, metavar="N", help="rows in a step (default: 8)")
    plan.add_argument("--device", default="auto", help="cpu or cuda, there or not (default: a GPU when there is one)")
    plan.add_argument(
        "--explain",
        metavar="key=value,…",
        help="where every byte of one combination goes, such as optimizer=fira,rank=64,adapter=lora,checkpointing=true",
    )
    plan.add_argument("--speed", action="store_true", help="try this machine for five seconds, forecast tokens/s too")
    plan.add_argument("--steps", type=int, metavar="N", help="and how long so many steps take")
    plan.add_argument("--all", action="store_true", help="all combinations, not only the best of each optimizer")
    plan.add_argument("--json", action="store_true", help="all combinations with all bytes, as JSON")

    report = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="make the report of a comparison anew, or one of several",
        description="Make the report of a comparison anew; of several, or of runs made one by one, make one report.",
    )
    report.add_argument("runs", metavar="FOLDER", nargs="+", help="a comparison, its report.json, or a run")
    report.add_argument("--out", metavar="FOLDER", help="where the report goes (default: the comparison's own folder)")

    chat = commands.add_parser(
        "chat",
        allow_abbrev=False,
        help="talk to a trained model",
        description="Talk to a model through its chat template. On a terminal Ctrl-C stops an answer, /reset forgets "
        "the conversation, Ctrl-D leaves; through a pipe each line is a message and only answers are printed.",
        epilog=EPILOG,
    )
    _model(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message (default: the template's own)")
    _sampling(chat, tokens=512, temperature=0.0)

    generate = commands.add_parser(
        "generate",
        allow_abbrev=False,
        help="let a trained model continue a text",
        description="Continue a text, without a chat template, and print only what is new.",
        epilog=EPILOG,
    )
    _model(generate)
    generate.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the text (default: standard input, but a newline at its end)"
    )
    _sampling(generate, tokens=200, temperature=0.8)

    evaluate = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="benchmark a trained model with lm-evaluation-harness",
        description="Hand a model to lm-evaluation-harness: fallline eval runs/mine --tasks arc_easy,hellaswag",
        epilog=EPILOG,
    )
    _model(evaluate)
    evaluate.add_argument("--tasks", metavar="a,b", required=True, help="names or patterns of the harness's tasks")
    evaluate.add_argument("--include", metavar="FOLDER", help="tasks of your own: YAML files")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    evaluate.add_argument("--batch", type=int, default=8, metavar="N", help="examples at a time (default: 8)")
    evaluate.add_argument("--out", metavar="FILE", help="write the harness's results here, as JSON")

    audit = commands.add_parser(
        "audit",
        allow_abbrev=False,
        help="what a trained model gives away, and what training did to it",
        description="Membership inference: score members and non-members, and report ROC, AUC and TPR at low FPR: "
        "fallline audit runs/mine --members trained.jsonl --non-members held-out.jsonl. Or an inspection of the "
        "weights or answers: fallline audit runs/mine --inspect intruder top=20",
        epilog=EPILOG,
    )
    audit.add_argument("run", metavar="RUN", help="the folder of a run; to inspect also an adapter's or a model's")
    audit.add_argument("options", metavar="key=value", nargs="*", help="options of what --inspect names")
    audit.add_argument("--members", metavar="FILE", help="JSON Lines that the run was trained on")
    audit.add_argument("--non-members", metavar="FILE", help="such as it was not, otherwise alike")
    audit.add_argument(
        "--inspect", metavar="ID", help="in place of the two; which there are: fallline methods inspection"
    )
    audit.add_argument("--base", metavar="MODEL", help="to inspect a model that does not say what it was made from")
    audit.add_argument(
        "--methods",
        metavar="a,b",
        help="default: all; loss and blind (words and lengths) are always reported beside them",
    )
    audit.add_argument("--out", metavar="FOLDER", help="where the report goes (default: RUN/audit)")
    audit.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU when there is one)")
    audit.add_argument("--batch", type=int, metavar="N", help="packed rows at a time (default: 8)")

    export = commands.add_parser(
        "export",
        allow_abbrev=False,
        help="write a trained model or adapter as a folder for Transformers or PEFT",
        description="Write a run's model, or its adapter, as a folder of its own, load it and compare its logits.",
        epilog=EPILOG,
    )
    export.add_argument("run", metavar="RUN", help="the folder of a run; with --merge also of a PEFT adapter")
    export.add_argument("out", metavar="OUT", help="a folder that is not there or empty")
    export.add_argument("--merge", action="store_true", help="add the adapter into the weights: a model without one")

    score = commands.add_parser(
        "score",
        allow_abbrev=False,
        help="score training examples by how hard short runs find them, to keep some",
        description="Score the training examples of a run, or of several of the same data and average, for the sampler "
        "data-diet: fallline score runs/short-1 runs/short-2 --by el2n --out scores.safetensors",
        epilog=EPILOG,
    )
    score.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a short run; best ten, of different seeds")
    score.add_argument(
        "--by",
        choices=("el2n", "grand", "loss"),
        required=True,
        help="the norm of the error in the output, or of the gradient, or the loss",
    )
    score.add_argument("--out", metavar="FILE", required=True, help="where the scores go: a file that is not there")
    score.add_argument("--batch", type=int, default=8, metavar="N", help="packed rows at a time (default: 8)")
    score.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU when there is one)")

    methods = commands.add_parser(
        "methods",
        allow_abbrev=False,
        help="search the catalogue",
        description="Search the catalogue: `fallline methods memory`. One card whole: `fallline methods show scale`.",
    )
    methods.add_argument("query", metavar="QUERY", nargs="*", help="words to look for; or: show ID")
    methods.add_argument("--json", action="store_true", help="cards as JSON")

    optim = commands.add_parser(
        "optim",
        help="what optimizers see of a model",
        description="What optimizers see of a model.",
    )
    asked = optim.add_subparsers(dest="ask", metavar="WHAT", required=True)
    roles = asked.add_parser(
        "roles",
        allow_abbrev=False,
        help="the role of each parameter",
        description="The role of each parameter, on which the rules of optimizers depend; weights are not loaded.",
    )
    roles.add_argument("model", metavar="MODEL", help="tiny … 7b, a 🤗 folder or hub id, or the folder of a run")
    roles.add_argument("--json", action="store_true", help="name → role and shape, as JSON")

    demo = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="train a small Llama once per optimizer and compare",
        description="Train a 1 M-parameter Llama on the English that every Python carries, once per optimizer.",
    )
    demo.add_argument("--budget", type=float, default=240.0, metavar="SECONDS", help="time to take (default: 240)")
    demo.add_argument("--out", default=None, metavar="FOLDER", help="run folders go here (default: runs/demo-NUMBER)")
    for command in commands.choices.values():
        command.set_defaults(usage=command.format_usage())
    return top


def _model(command: argparse.ArgumentParser) -> None:
    """What to use, and where."""
    command.add_argument(
        "model", metavar="MODEL", help="the folder of a run, a model or an adapter; a model's name or 🤗 hub id"
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU when there is one)")


def _sampling(command: argparse.ArgumentParser, tokens: int, temperature: float) -> None:
    """How text is drawn."""
    command.add_argument(
        "--max-tokens", type=int, default=tokens, metavar="N", help=f"at most so many (default: {tokens})"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=f"0 takes the likeliest token, 1 draws as the model would (default: {temperature:g})",
    )
    command.add_argument(
        "--top-k", type=int, default=50, metavar="K", help="draw among the K likeliest; 0: among all (default: 50)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")


def _unknown(command: str, usage: str, words: Sequence[str]) -> str:
    """What is wrong with words that a command does not take, and what would be right."""
    word = next((word for word in words if word.startswith("-")), words[0])
    if not word.startswith("-"):
        return f"fallline {command} takes no {word!r}; {' '.join(usage.split())}"
    name, _, value = word.lstrip("-").partition("=")
    known = nearest(name, re.findall(r"(?<![\w-])--([a-z-]+)", usage))
    if command in ("train", "compare") and not known.startswith("did you mean"):
        value = value or next(iter(words[words.index(word) + 1 :]), "value")
        known = f"what the recipe says is replaced by key=value, here perhaps {name}={value}"
    return f"fallline {command} has no option {name!r}; {known}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code; see `fallline.errors`.
    """
    top = parser()
    args, rest = top.parse_known_args(argv)
    if args.command == "generate" and args.prompt is None and rest:  # argparse loses it where it follows an option
        last = rest[-1]
        if (len(rest) == 1 and (not last.startswith("-") or " " in last)) or (len(rest) == 2 and rest[0] == "--"):
            args.prompt, rest = last, []
    if rest and (args.command not in ("train", "compare", "audit") or any(word.startswith("-") for word in rest)):
        print(f"fallline: error: {_unknown(args.command, args.usage, rest)}", file=sys.stderr)
        return InputError.exit_code
    logging.basicConfig(format="fallline: %(message)s", level=logging.WARNING)
    try:
        if args.command == "methods":
            from .methods import methods

            return methods(args.query, as_json=args.json)
        if args.command == "optim":
            from .optim import roles

            return roles(args.model, as_json=args.json)
        if args.command == "demo":
            from .demo import demo

            return demo(args.budget, args.out)
        if args.command == "compare":
            from .compare import run

            return run(args, [*args.overrides, *rest], sys.argv[1:] if argv is None else argv)
        if args.command == "plan":
            from .plan import run as planned

            return planned(args)
        if args.command == "report":
            from .compare import report

            return report(args.runs, args.out)
        if args.command == "chat":
            from .chat import chat

            return chat(args)
        if args.command == "generate":
            from .generate import generate

            return generate(args)
        if args.command == "eval":
            from .evaluate import evaluate

            return evaluate(args)
        if args.command == "audit":
            from .audit import audit

            return audit(args, [*args.options, *rest], sys.argv[1:] if argv is None else argv)
        if args.command == "export":
            from .export import export

            return export(args.run, args.out, args.merge)
        if args.command == "score":
            from .score import score

            return score(args)
        from .train import train

        return train(args.recipe, [*args.overrides, *rest], args.resume, args.print_recipe, args.quiet, args.force)
    except FalllineError as error:
        print(f"fallline: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fallline: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        print(f"fallline: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return InputError.exit_code


if __name__ == "__main__":
    sys.exit(main())
