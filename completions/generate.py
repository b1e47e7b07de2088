#!/usr/bin/env python3
"""Write the shell completions from egressctl's own command line, so that the two cannot drift apart.

.venv/bin/python completions/generate.py            write them
.venv/bin/python completions/generate.py --check    exit status 1 if they are out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from egressd.cli.main import whole_parser

HERE = Path(__file__).parent
FILES = {"bash": "egressctl.bash", "zsh": "_egressctl", "fish": "egressctl.fish"}
# what a metavar stands for; anything else is completed with nothing
KINDS = {
    "DIR": "directory",
    "FILE": "file",
    "FILE|DIRECTORY": "file",
    "WORKSPACE": "workspace",
    "FILE|WORKSPACE": "file-or-workspace",
    "CMD": "command",
    "COMMAND": "command",
}


@dataclass(frozen=True)
class Option:
    names: tuple[str, ...]
    help: str
    kind: str | None  # None: takes no value


@dataclass(frozen=True)
class Command:
    """`path` is () for egressctl itself, ("policy", "check") for an action."""

    path: tuple[str, ...]
    help: str
    options: tuple[Option, ...]
    arguments: tuple[str, ...]  # kinds of its positional arguments
    below: tuple[str, ...]  # verbs or actions

    @property
    def key(self) -> str:
        return "_".join(self.path)


def commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = (), summary: str = ""
) -> Iterator[Command]:
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser] | None = None
    options, arguments = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            subparsers = action
        elif action.option_strings:
            options.append(_option(action))
        else:
            arguments.append(_kind(action))
    below = tuple(subparsers.choices) if subparsers else ()
    yield Command(path, summary, tuple(options), tuple(arguments), below)
    if subparsers:
        summaries = {choice.dest: choice.help or "" for choice in subparsers._choices_actions}
        for name, child in subparsers.choices.items():
            yield from commands(child, (*path, name), summaries.get(name, ""))


def _option(action: argparse.Action) -> Option:
    kind = None if action.nargs == 0 else _kind(action)
    return Option(tuple(action.option_strings), (action.help or "").split(" (%")[0], kind)


def _kind(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return KINDS.get(metavar, "none")


# ---- bash

_BASH = """\
# bash completion for egressctl. Written by completions/generate.py: change that, or the command line.

_egressctl_workspaces() {
    # Names are lower-case letters, digits and hyphens, so a pattern is enough to find them.
    egressctl "$@" --json status 2>/dev/null |
        grep -o '"workspace": *"[a-z0-9-]*"' | cut -d '"' -f 4 | sort -u
}

# command -> its verbs or actions; its options; the kinds of its arguments
declare -gA _egressctl_below=(
@BELOW@
)
declare -gA _egressctl_options=(
@OPTIONS@
)
declare -gA _egressctl_arguments=(
@ARGUMENTS@
)
# command and option -> the kind of its value
declare -gA _egressctl_values=(
@VALUES@
)

_egressctl() {
    local current=${COMP_WORDS[COMP_CWORD]} at=egressctl word kind run_dir=() i
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == -- ]]; then
            COMPREPLY=($(compgen -A command -A file -- "$current"))
            return
        elif [[ -n ${_egressctl_values[$at $word]} ]]; then
            [[ $word == --run-dir ]] && run_dir=(--run-dir "${COMP_WORDS[i + 1]}")
            kind=${_egressctl_values[$at $word]}
            ((++i))
            ((i == COMP_CWORD)) && break
            kind=
        elif [[ " ${_egressctl_below[$at]} " == *" $word "* ]]; then
            at="$at $word"
        fi
    done
    if [[ -z $kind && $current == -* ]]; then
        COMPREPLY=($(compgen -W "${_egressctl_options[$at]}" -- "$current"))
        return
    elif [[ -z $kind && -n ${_egressctl_below[$at]} ]]; then
        COMPREPLY=($(compgen -W "${_egressctl_below[$at]}" -- "$current"))
        return
    fi
    case ${kind:-${_egressctl_arguments[$at]}} in
        directory) COMPREPLY=($(compgen -d -- "$current")) ;;
        file) COMPREPLY=($(compgen -f -- "$current")) ;;
        command) COMPREPLY=($(compgen -A command -- "$current")) ;;
        workspace) COMPREPLY=($(compgen -W "$(_egressctl_workspaces "${run_dir[@]}")" -- "$current")) ;;
        file-or-workspace)
            COMPREPLY=($(compgen -f -W "$(_egressctl_workspaces "${run_dir[@]}")" -- "$current")) ;;
    esac
}
complete -o filenames -F _egressctl egressctl
"""


def bash(found: list[Command]) -> str:
    def entries(values: dict[str, str]) -> str:
        return "\n".join(f'    ["{key}"]="{value}"' for key, value in values.items() if value)

    at = {command: " ".join(("egressctl", *command.path)) for command in found}
    values = {f"{at[c]} {name}": o.kind for c in found for o in c.options if o.kind for name in o.names}
    return (
        _BASH.replace("@BELOW@", entries({at[c]: " ".join(c.below) for c in found}))
        .replace(
            "@OPTIONS@", entries({at[c]: " ".join(n for o in c.options for n in o.names) for c in found})
        )
        .replace("@ARGUMENTS@", entries({at[c]: (c.arguments or ("",))[0] for c in found}))
        .replace("@VALUES@", entries(values))
    )


# ---- zsh

_ZSH_HEAD = """\
#compdef egressctl
# zsh completion for egressctl. Written by completions/generate.py: change that, or the command line.

_egressctl_workspaces() {
    local -a names
    names=(${(f)"$(egressctl --json status 2>/dev/null |
        grep -o '"workspace": *"[a-z0-9-]*"' | cut -d '"' -f 4 | sort -u)"})
    _describe workspace names
}
"""
_ZSH_KINDS = {
    "directory": "_files -/",
    "file": "_files",
    "command": "_command_names -e",
    "workspace": "_egressctl_workspaces",
    "file-or-workspace": "_alternative 'files:file:_files' 'workspaces:workspace:_egressctl_workspaces'",
    "none": "",
}


def zsh(found: list[Command]) -> str:
    return "\n".join([_ZSH_HEAD, *(_zsh_function(c, found) for c in found), '_egressctl "$@"', ""])


def _zsh_function(command: Command, found: list[Command]) -> str:
    name = "_egressctl" + (f"_{command.key}" if command.path else "")
    specs = [_zsh_option(option, name) for option in command.options for name in option.names]
    if command.below:
        specs += ["'1: :->below'", "'*:: :->rest'"]
    else:
        specs += [f'"*: :{_ZSH_KINDS[kind]}"' for kind in command.arguments[:1]]
    lines = [f"{name}() {{", "    local curcontext=$curcontext state line", "    _arguments -C \\"]
    lines += [f"        {spec} \\" for spec in specs[:-1]]
    lines.append(f"        {specs[-1]}")
    if command.below:
        below = [c for c in found if c.path[:-1] == command.path and c.path]
        described = " ".join(_quoted(f"{c.path[-1]}:{c.help}") for c in below)
        lines += [
            "    case $state in",
            f"        below) local -a below; below=({described}); _describe verb below ;;",
            "        rest) case $words[1] in",
            *(f"            {c.path[-1]}) _egressctl_{c.key} ;;" for c in below),
            "        esac ;;",
            "    esac",
        ]
    return "\n".join([*lines, "}", ""])


def _zsh_option(option: Option, name: str) -> str:
    text = option.help.replace("[", "(").replace("]", ")").replace(":", "")
    value = "" if option.kind is None else f":value:{_ZSH_KINDS[option.kind]}"
    return _quoted(f"{name}[{text}]{value}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# ---- fish

_FISH_HEAD = """\
# fish completion for egressctl. Written by completions/generate.py: change that, or the command line.

function __egressctl_workspaces
    egressctl --json status 2>/dev/null | string match -rga '"workspace": *"([a-z0-9-]*)"' | sort -u
end

complete -c egressctl -f
"""
_FISH_KINDS = {
    "directory": "-x -a '(__fish_complete_directories)'",
    "file": "-r -F",
    "command": "-x -a '(__fish_complete_command)'",
    "workspace": "-x -a '(__egressctl_workspaces)'",
    "file-or-workspace": "-r -F -a '(__egressctl_workspaces)'",
    "none": "-x",
}


def fish(found: list[Command]) -> str:
    return _FISH_HEAD + "\n".join(line for c in found for line in _fish_lines(c, found)) + "\n"


def _fish_lines(command: Command, found: list[Command]) -> Iterator[str]:
    seen = [f"__fish_seen_subcommand_from {name}" for name in command.path]
    if command.below:
        seen.append(f"not __fish_seen_subcommand_from {' '.join(command.below)}")
    start = f"complete -c egressctl -n {_quoted('; and '.join(seen))}"
    for child in found:
        if child.path and child.path[:-1] == command.path:
            yield f"{start} -a {child.path[-1]} -d {_quoted(child.help)}"
    for option in command.options:
        names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
        value = "" if option.kind is None else f" {_FISH_KINDS[option.kind]}"
        yield f"{start} {names}{value} -d {_quoted(option.help)}"
    for kind in command.arguments[:1]:
        if kind != "none":
            yield f"{start} {_FISH_KINDS[kind]}"


def written() -> dict[Path, str]:
    """What each file should hold."""
    found = list(commands(whole_parser()))
    return {
        HERE / FILES[shell]: make(found) for shell, make in (("bash", bash), ("zsh", zsh), ("fish", fish))
    }


def main(argv: list[str]) -> int:
    stale = [path for path, text in written().items() if not path.exists() or path.read_text() != text]
    if "--check" in argv:
        for path in stale:
            print(f"{path} is out of date: run completions/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in written().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
