#!/bin/bash
# Makes a fresh Debian 12 or Ubuntu 24.04 one of the three machines of a small laboratory. Said twice, it changes
# nothing. vagrant/Vagrantfile runs it in virtual machines, tests/system in containers. Needs root, and no network but
# the distribution's packages, those only if they are missing.
#
#   provision.sh guard --deb FILE --internet ADDRESS --client ADDRESS   egressd, and a workspace for the account "lab"
#   provision.sh internet                                               the host that the workspace may reach
#   provision.sh client                                                 a neighbour, that it may not reach
set -euo pipefail
umask 022

say() { echo "provision: $*"; }
fail() { echo "provision: $*" >&2; exit 1; }

role=${1:-}
[ $# -gt 0 ] && shift
deb='' internet='' client=''
while [ $# -gt 0 ]; do
  case $1 in
    --deb) deb=${2:?} ;;
    --internet) internet=${2:?} ;;
    --client) client=${2:?} ;;
    *) fail "unknown option $1" ;;
  esac
  shift 2
done

[ "$(id -u)" -eq 0 ] || fail "needs root"
. /etc/os-release
case "$ID $VERSION_ID" in
  'debian 12' | 'ubuntu 24.04') ;;
  *) fail "$PRETTY_NAME is neither Debian 12 nor Ubuntu 24.04" ;;
esac

# Only what is missing: a machine that has everything needs no network.
need() {
  local package missing=()
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# Writes standard input to FILE unless that is what it says; true if it was changed.
write() {
  local file=$1 text
  text=$(cat)
  [ -f "$file" ] && [ "$text" = "$(cat "$file")" ] && return 1
  printf '%s\n' "$text" > "$file.new"
  mv "$file.new" "$file"
}

guard() {
  [ -n "$deb" ] && [ -n "$internet" ] && [ -n "$client" ] || fail "guard needs --deb, --internet and --client"
  [ -f "$deb" ] || fail "there is no $deb; build it on this distribution: packaging/build-deb"
  need curl
  install_deb
  id lab > /dev/null 2>&1 || useradd --create-home --shell /bin/bash lab
  # Ubuntu lets only programs with an AppArmor profile make user namespaces, which sandboxes are made of. A machine
  # that is not a laboratory gives bubblewrap a profile instead.
  local restriction=/proc/sys/kernel/apparmor_restrict_unprivileged_userns
  if [ -e $restriction ] && write /etc/sysctl.d/60-egressd-lab.conf <<< 'kernel.apparmor_restrict_unprivileged_userns = 0'; then
    sysctl -q --load /etc/sysctl.d/60-egressd-lab.conf
  fi
  local changed=false
  write /etc/egressd/egressd.yaml <<CONFIGURATION && changed=true
# Written by provision.sh: the laboratory's names.
hosts:
  allowed.lab: [$internet]
  forbidden.lab: [$client]
CONFIGURATION
  write /etc/egressd/workspaces/lab.yaml <<'POLICY' && changed=true
workspace: lab
guard: enforce
members: [user:lab]
allow:
  - host: allowed.lab
    ports: [80/tcp]
    private: true    # the laboratory's addresses are
POLICY
  egressd --check
  egressctl policy check /etc/egressd/workspaces
  systemctl enable --quiet egressd
  if $changed || ! systemctl is-active --quiet egressd; then
    say "starting egressd"
    systemctl restart egressd
  fi
}

# Unless this very version is there.
install_deb() {
  local wanted there
  wanted=$(dpkg-deb -f "$deb" Version)
  there=$(dpkg-query -W -f '${db:Status-Abbrev} ${Version}' egressd 2>/dev/null || true)
  [ "$there" = "ii  $wanted" ] && return
  say "installing egressd $wanted"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$(realpath "$deb")" || {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$(realpath "$deb")"
  }
}

# A page that says who answered, on port 80 of every address.
page() {
  need python3
  mkdir -p /srv/lab
  write /srv/lab/index.html <<< "$1" || true
  if write /etc/systemd/system/lab-page.service <<'UNIT'; then
[Unit]
Description=The laboratory's page
After=network.target

[Service]
ExecStart=/usr/bin/python3 -m http.server 80 --directory /srv/lab
DynamicUser=yes
AmbientCapabilities=CAP_NET_BIND_SERVICE

[Install]
WantedBy=multi-user.target
UNIT
    systemctl daemon-reload
  fi
  systemctl enable --quiet --now lab-page
}

case $role in
  guard) guard ;;
  internet) page "the internet" ;;
  client) page "a neighbour" ;;
  *) sed -n '2,8s/^# \?//p' "$0" >&2; exit 2 ;;
esac
say "$role is ready"
