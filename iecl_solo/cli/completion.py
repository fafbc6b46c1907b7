"""``iecl-solo completion``: commands, configurations and files, completed by bash and zsh."""

from __future__ import annotations

import argparse
import importlib

_BASH = """\
_iecl_solo() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [[ $COMP_CWORD == 1 || ( $COMP_CWORD == 2 && $previous == help ) ]]; then
        words="{commands}"
    elif [[ $previous == --config-name || $previous == -cn ]]; then
        case "${{COMP_WORDS[1]}}" in
{names}
        esac
    elif [[ $current == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{flags}
        esac
    fi
    if [[ -n $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    else
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -F _iecl_solo iecl-solo
"""

#: zsh runs bash's completion.
_ZSH = "autoload -Uz compinit bashcompinit && compinit -u && bashcompinit\n"


def script(shell: str) -> str:
    """What the shell evaluates: ``eval "$(iecl-solo completion bash)"``."""
    from iecl_solo.cli.main import COMMANDS, HYDRA_COMMANDS, PLAIN_COMMANDS
    from iecl_solo.train.packaged import packaged_configs

    names, flags = [], []
    for command, (_, folder, _what) in HYDRA_COMMANDS.items():
        names.append(f'            {command}) words="{" ".join(packaged_configs(folder))}" ;;')
        flags.append(
            f'            {command}) words="--config-name --config-path --cfg --multirun --help" ;;'
        )
    for command, (module, _what) in PLAIN_COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(f"iecl_solo.cli.{module}").add_arguments(parser)
        options = (s for action in parser._actions for s in action.option_strings)
        known = sorted(option for option in options if option.startswith("--"))
        flags.append(f'            {command}) words="{" ".join(known)}" ;;')
    text = _BASH.format(
        commands=" ".join(["help", *COMMANDS]), names="\n".join(names), flags="\n".join(flags)
    )
    return _ZSH + text if shell == "zsh" else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("shell", choices=("bash", "zsh"), help="whose completion to print")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(script(args.shell), end="")
    return 0
