# bash completion for egressctl. Written by completions/generate.py: change that, or the command line.

_egressctl_workspaces() {
    # Names are lower-case letters, digits and hyphens, so a pattern is enough to find them.
    egressctl "$@" --json status 2>/dev/null |
        grep -o '"workspace": *"[a-z0-9-]*"' | cut -d '"' -f 4 | sort -u
}

# command -> its verbs or actions; its options; the kinds of its arguments
declare -gA _egressctl_below=(
    ["egressctl"]="run status policy guard residency local-only route why counters ruleset audit watch proof verify key"
    ["egressctl policy"]="check lint diff apply explain"
    ["egressctl residency"]="import tables lookup"
    ["egressctl key"]="show rotate"
)
declare -gA _egressctl_options=(
    ["egressctl"]="-h --help --run-dir --json --version"
    ["egressctl run"]="-h --help --run-dir -w --workspace --files --bind-ro --env --wall --receipt --dry-run --debug"
    ["egressctl status"]="-h --help --json --run-dir"
    ["egressctl policy"]="-h --help --json --run-dir"
    ["egressctl policy check"]="-h --help --json --run-dir --residency-dir"
    ["egressctl policy lint"]="-h --help --json --run-dir --format --residency-dir --pin --strict --disable"
    ["egressctl policy diff"]="-h --help --json --run-dir --exit-code"
    ["egressctl policy apply"]="-h --help --json --run-dir --dry-run"
    ["egressctl policy explain"]="-h --help --json --run-dir --residency-dir"
    ["egressctl guard"]="-h --help --json --run-dir --dry-run --workspaces-dir"
    ["egressctl residency"]="-h --help --json --run-dir -w --workspace"
    ["egressctl residency import"]="-h --help --json --run-dir --name --format --provider --region --country --sha256 --signature --key --residency-dir --check"
    ["egressctl residency tables"]="-h --help --json --run-dir --residency-dir"
    ["egressctl residency lookup"]="-h --help --json --run-dir --pin --residency-dir"
    ["egressctl local-only"]="-h --help --json --run-dir --dry-run --workspaces-dir"
    ["egressctl route"]="-h --help --json --run-dir -w --workspace"
    ["egressctl why"]="-h --help --json --run-dir -w --workspace"
    ["egressctl counters"]="-h --help --json --run-dir"
    ["egressctl ruleset"]="-h --help --json --run-dir"
    ["egressctl audit"]="-h --help --run-dir --json -w --workspace --sandbox --host --event --verdict --reason --since --until -n --limit -r --reverse -f --follow --journal"
    ["egressctl watch"]="-h --help --run-dir --json -w --workspace --interval --once --journal"
    ["egressctl proof"]="-h --help --json --run-dir -w --workspace --sandbox --since --until --checkpoint -o --output --html"
    ["egressctl verify"]="-h --help --json --run-dir --journal --key --policy --checkpoint --html"
    ["egressctl key"]="-h --help --json --run-dir"
    ["egressctl key show"]="-h --help --json --run-dir --pem"
    ["egressctl key rotate"]="-h --help --json --run-dir"
)
declare -gA _egressctl_arguments=(
    ["egressctl run"]="command"
    ["egressctl policy check"]="file"
    ["egressctl policy lint"]="file"
    ["egressctl policy explain"]="file-or-workspace"
    ["egressctl guard"]="workspace"
    ["egressctl residency import"]="file"
    ["egressctl residency lookup"]="none"
    ["egressctl local-only"]="workspace"
    ["egressctl route"]="none"
    ["egressctl why"]="none"
    ["egressctl counters"]="workspace"
    ["egressctl verify"]="file"
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
    ["egressctl run --receipt"]="file"
    ["egressctl status --run-dir"]="directory"
    ["egressctl policy --run-dir"]="directory"
    ["egressctl policy check --run-dir"]="directory"
    ["egressctl policy check --residency-dir"]="directory"
    ["egressctl policy lint --run-dir"]="directory"
    ["egressctl policy lint --format"]="none"
    ["egressctl policy lint --residency-dir"]="directory"
    ["egressctl policy lint --pin"]="none"
    ["egressctl policy lint --disable"]="none"
    ["egressctl policy diff --run-dir"]="directory"
    ["egressctl policy apply --run-dir"]="directory"
    ["egressctl policy explain --run-dir"]="directory"
    ["egressctl policy explain --residency-dir"]="directory"
    ["egressctl guard --run-dir"]="directory"
    ["egressctl guard --workspaces-dir"]="directory"
    ["egressctl residency --run-dir"]="directory"
    ["egressctl residency -w"]="workspace"
    ["egressctl residency --workspace"]="workspace"
    ["egressctl residency import --run-dir"]="directory"
    ["egressctl residency import --name"]="none"
    ["egressctl residency import --format"]="none"
    ["egressctl residency import --provider"]="none"
    ["egressctl residency import --region"]="none"
    ["egressctl residency import --country"]="none"
    ["egressctl residency import --sha256"]="none"
    ["egressctl residency import --signature"]="file"
    ["egressctl residency import --key"]="file"
    ["egressctl residency import --residency-dir"]="directory"
    ["egressctl residency tables --run-dir"]="directory"
    ["egressctl residency tables --residency-dir"]="directory"
    ["egressctl residency lookup --run-dir"]="directory"
    ["egressctl residency lookup --pin"]="none"
    ["egressctl residency lookup --residency-dir"]="directory"
    ["egressctl local-only --run-dir"]="directory"
    ["egressctl local-only --workspaces-dir"]="directory"
    ["egressctl route --run-dir"]="directory"
    ["egressctl route -w"]="workspace"
    ["egressctl route --workspace"]="workspace"
    ["egressctl why --run-dir"]="directory"
    ["egressctl why -w"]="workspace"
    ["egressctl why --workspace"]="workspace"
    ["egressctl counters --run-dir"]="directory"
    ["egressctl ruleset --run-dir"]="directory"
    ["egressctl audit --run-dir"]="directory"
    ["egressctl audit -w"]="workspace"
    ["egressctl audit --workspace"]="workspace"
    ["egressctl audit --sandbox"]="none"
    ["egressctl audit --host"]="none"
    ["egressctl audit --event"]="none"
    ["egressctl audit --verdict"]="none"
    ["egressctl audit --reason"]="none"
    ["egressctl audit --since"]="none"
    ["egressctl audit --until"]="none"
    ["egressctl audit -n"]="none"
    ["egressctl audit --limit"]="none"
    ["egressctl audit --journal"]="directory"
    ["egressctl watch --run-dir"]="directory"
    ["egressctl watch -w"]="workspace"
    ["egressctl watch --workspace"]="workspace"
    ["egressctl watch --interval"]="none"
    ["egressctl watch --journal"]="directory"
    ["egressctl proof --run-dir"]="directory"
    ["egressctl proof -w"]="workspace"
    ["egressctl proof --workspace"]="workspace"
    ["egressctl proof --sandbox"]="none"
    ["egressctl proof --since"]="none"
    ["egressctl proof --until"]="none"
    ["egressctl proof --checkpoint"]="file"
    ["egressctl proof -o"]="file"
    ["egressctl proof --output"]="file"
    ["egressctl proof --html"]="file"
    ["egressctl verify --run-dir"]="directory"
    ["egressctl verify --journal"]="directory"
    ["egressctl verify --key"]="none"
    ["egressctl verify --policy"]="none"
    ["egressctl verify --checkpoint"]="file"
    ["egressctl verify --html"]="file"
    ["egressctl key --run-dir"]="directory"
    ["egressctl key show --run-dir"]="directory"
    ["egressctl key rotate --run-dir"]="directory"
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
