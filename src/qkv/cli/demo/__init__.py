"""`qkv demo`: a question answered from a text by attention, on one screen; then prompts served on a paged cache."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec

from qkv.errors import ArgumentError, UnsupportedError

REFERENCE_QUESTION = "What does break do to the else clause of a loop?"
PROMPT = "The break statement "  # continued by the model that ships with the package
NO_MODEL = "no model and no pages here: safetensors is missing (pip install safetensors)"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `qkv demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="answer a question from a text by attention, and show every step",
        description="Look a question up in a text by attention and show every step. Nothing of that is trained: q, k "
        "and v count words. Then the model that ships with the package serves several prompts at once, its keys and "
        "values on pages of one cache. Takes well under a minute.",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="a text file (default: Python's language reference)")
    parser.add_argument("--ask", metavar="QUESTION", help="what to look up (default: a question about the text)")
    parser.add_argument("--full", action="store_true", help="also print the passages whole, the plan and all timings")
    parser.add_argument(
        "--long", action="store_true", help="instead: a million tokens of a sparse call, in one to three minutes"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="with --long: up to so many tokens (default 1,000,000)")
    parser.add_argument(
        "--svg",
        metavar="PATH",
        help="with --long: draw time and memory into a file; with {} in PATH one for each theme",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `qkv demo` and return the exit code."""
    if args.ask is not None and not any(letter.isalnum() for letter in args.ask):
        raise ArgumentError.of("qkv demo", "the question has no words", repr(args.ask), 'Use --ask "some words"')
    if args.long:
        return _long(args)
    if args.tokens is not None or args.svg is not None:
        raise ArgumentError.of("qkv demo", "--tokens and --svg go with --long", "no --long", "Add --long")
    from qkv.cli.demo import measure, screen
    from qkv.cli.demo.details import details
    from qkv.cli.demo.lookup import Lookup
    from qkv.cli.demo.reading import read_file, read_reference
    from qkv.cli.demo.serving import serve
    from qkv.cli.progress import Progress

    plain = args.file is None and args.ask is None
    with Progress("qkv demo") as progress:
        progress.say("reading the text")
        text = read_reference() if args.file is None else read_file(args.file)
        progress.say(f"counting the words of {len(text.passages):,} passages")
        lookup = Lookup(text)
        question = args.ask or (REFERENCE_QUESTION if args.file is None else lookup.telling_question())
        found = lookup.ask(question)
        agreed = measure.agreement(found.q, lookup.features.k, lookup.features.v, progress.say)
        timings = [measure.decode(dtype, progress.say) for dtype in ("bfloat16", "float32")]
        said, absent = _continued(progress.say) if args.file is None else ("", "")
    absences = [absent, screen.NO_KERNELS if "cpu" not in agreed.errors else ""]
    print(screen.first(text, found, agreed, timings, said, list(filter(None, absences)), last=not plain))
    if args.full:
        print(details(found, agreed, timings))
    if plain:
        serve()
        print(screen.hint())
    return 0


def _long(args: argparse.Namespace) -> int:
    if args.file is not None or args.ask is not None or args.full:
        raise ArgumentError.of(
            "qkv demo", "--long takes no text", "--long with a file, --ask or --full", "Leave it out"
        )
    from qkv.cli.demo import long

    return long.run(long.TOKENS if args.tokens is None else args.tokens, args.svg)


def _continued(say: Callable[[str], None]) -> tuple[str, str]:
    """A prompt and how the shipped model, trained on the same text, continues it; or why it cannot, and the cure."""
    say("asking the shipped model to go on")
    try:
        from qkv.lm.generation import continue_prompt

        return f"“{PROMPT.strip()}” {continue_prompt(PROMPT, 120, temperature=0.5).text}", ""
    except UnsupportedError as error:
        return "", NO_MODEL if find_spec("safetensors") is None else f"no model and no pages here: {error}"
