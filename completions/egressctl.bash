# bash completion for egressctl. Written by completions/generate.py: change that, or the command line.

_egressctl_workspaces() {
    # Names are lower-case letters, digits and hyphens, so a pattern is enough to find them.
    egressctl "$@" --json status 2>/dev/null |
        grep -o '"workspace": *"[a-z0-9-]*"' | cut -d '"' -f 4 | sort -u
}

# command -> its verbs or actions; its options; the kinds of its arguments
declare -gA _egressctl_below=(
    ["egressctl"]="run status policy why counters ruleset"
    ["egressctl policy"]="check diff apply explain"
)
declare -gA _egressctl_options=(
    ["egressctl"]="-h --help --run-dir --json --version"
    ["egressctl run"]="-h --help --run-dir -w --workspace --files --bind-ro --env --wall --dry-run --debug"
    ["egressctl status"]="-h --help --json --run-dir"
    ["egressctl policy"]="-h --help --json --run-dir"
    ["egressctl policy check"]="-h --help --json --run-dir"
    ["egressctl policy diff"]="-h --help --json --run-dir --exit-code"
    ["egressctl policy apply"]="-h --help --json --run-dir --dry-run"
    ["egressctl policy explain"]="-h --help --json --run-dir"
    ["egressctl why"]="-h --help --json --run-dir -w --workspace"
    ["egressctl counters"]="-h --help --json --run-dir"
    ["egressctl ruleset"]="-h --help --json --run-dir"
)
declare -gA _egressctl_arguments=(
    ["egressctl run"]="command"
    ["egressctl policy check"]="file"
    ["egressctl policy explain"]="file-or-workspace"
    ["egressctl why"]="none"
    ["egressctl counters"]="workspace"
)
# command and option -> the kind of its value
declare -gA _egressctl_values=(
    ["egressctl --run-dir"]="directory"
    ["egressctl run --run-dir"]="directory"
    ["egressctl run -w"]="workspace"
    ["egressctl run --workspace"]="workspace"
    ["egressctl run --files"]="directory"
    ["egressctl run --bind-ro"]="directory"
    ["egressctl run --env"]="none"
    ["egressctl run --wall"]="none"
    ["egressctl status --run-dir"]="directory"
    ["egressctl policy --run-dir"]="directory"
    ["egressctl policy check --run-dir"]="directory"
    ["egressctl policy diff --run-dir"]="directory"
    ["egressctl policy apply --run-dir"]="directory"
    ["egressctl policy explain --run-dir"]="directory"
    ["egressctl why --run-dir"]="directory"
    ["egressctl why -w"]="workspace"
    ["egressctl why --workspace"]="workspace"
    ["egressctl counters --run-dir"]="directory"
    ["egressctl ruleset --run-dir"]="directory"
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
