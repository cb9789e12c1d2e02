# shellcheck shell=bash
# Unpacks Debian's packages into a folder of this project, for the scripts that source this one: the system stays as it
# is, because apt gets state, cache and sources of its own there.
#
# The script that sources it runs under `set -euo pipefail` and has set
#
#   home      the folder of this project that all of this is about; git is told to ignore it
#   lacking   how a message begins that says why something cannot be had, such as "no GPU, and"
#   say, fail a function that says something on standard error, and one that says it and ends the script

work=$home/work

aptget() { apt-get -c "$work/apt.conf" "$@" 2>>"$work/log"; }

# claim WHAT: makes $home and holds its lock until this shell ends
claim() {
  local tool
  for tool in apt-get dpkg ldd flock; do
    command -v "$tool" >/dev/null || fail "$lacking no $tool to fetch Debian's $1 with"
  done
  [[ $home != *[:\"\\]* ]] || fail "$lacking $1 cannot lie under a path with a colon, quote or backslash"
  (mkdir -p "$home/runtime" && chmod 700 "$home/runtime" && echo '*' >"$home/.gitignore" && : >>"$home/lock") \
    2>/dev/null || fail "$lacking cannot write to $home"
  exec 9>>"$home/lock"
  flock -n 9 || { say "another process is unpacking $1: waiting"; flock 9; }
}

# Sets id and codename to what this system calls itself and its release.
read_release() {
  # shellcheck source=/dev/null
  read -r id codename < <(. /etc/os-release && echo "${ID:-} ${UBUNTU_CODENAME:-${VERSION_CODENAME:-}}") || true
}

# configure_apt WHAT SUFFIX…: writes an apt.conf and a sources.list of our own. These have the machine's own sources of
# its release, and of the suites with one of the suffixes; -backports also where the machine has no source for it.
configure_apt() {
  local what=$1 sources keyring
  shift
  # shellcheck disable=SC2016 # apt fills these in: it knows all the ways in which sources can be written down
  sources=$(apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' \
    'Created-By: Packages' | awk -v suite="$codename" -v suffixes=" $* " '
      $2 == suite || index($2, suite "-") == 1 && index(suffixes, " " substr($2, length(suite) + 1) " ")
    ' | sort -u) || true
  [ -n "$sources" ] || fail "$lacking apt has no source for '$codename' to take $what from"
  case " $* " in *' -backports '*)
    sources+=$'\n'$(awk -v suite="$codename" '
      $2 == suite && $3 == "main" { print $1, suite "-backports main"; exit }
    ' <<<"$sources")
    ;;
  esac
  keyring=/usr/share/keyrings/$id-archive-keyring.gpg
  [ -r "$keyring" ] && keyring=" signed-by=$keyring" || keyring=
  sort -u <<<"$sources" | awk -v options="target=Packages arch=$(dpkg --print-architecture)$keyring" \
    '{ print "deb [" options "]", $0 }' >"$work/sources.list"
  # apt reads this after the machine's own settings: its proxy stays, its hooks go
  cat >"$work/apt.conf" <<END
#clear APT::Update;
Dir::State "$work/state"; Dir::Cache "$work/cache"; Dir::Etc::sourcelist "$work/sources.list";
Dir::Etc::sourceparts "/dev/null"; Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
APT::Default-Release ""; APT::Sandbox::User "root"; APT::Update::Error-Mode "any"; Debug::NoLocking "true";
Acquire::Languages "none"; Acquire::Retries "1"; Acquire::http::Timeout "15"; Acquire::https::Timeout "15";
END
}

# begin WHAT SUFFIX…: an empty place to work in, with an apt of our own; see configure_apt
begin() {
  mkdir -p "$work"/{state/lists/partial,cache/archives/partial,debs} && cd "$work/debs"
  configure_apt "$@"
}

# unpack_packages PACKAGE…: unpacks them, and what they need and this machine lacks, into $work/root
unpack_packages() {
  local packages count bytes package
  aptget update >>"$work/log" || fail "cannot read the package lists (no network?), see $work/log"
  # what an installation would bring is what this machine lacks; a C library next to the system's would crash programs
  packages=$(aptget install --simulate --reinstall --no-install-recommends "$@" |
    sed -nE '/^Inst libc6/d; s/^Inst (\S+) (\[\S+\] )?\((\S+) .*/\1=\3/p') ||
    fail "apt cannot resolve $*, see $work/log"
  read -ra packages <<<"${packages//$'\n'/ }"
  read -r count bytes < <(aptget download --print-uris "${packages[@]}" | awk '{ sum += $3 } END { print NR, sum + 0 }')
  [ "$count" -eq 0 ] || say "downloading $count packages (about $(((bytes + 999999) / 1000000)) MB)"
  aptget download "${packages[@]}" >>"$work/log" || fail "the download failed (the next run resumes it), see $work/log"
  rm -rf "$work/root"
  for package in "${packages[@]/:/%3a}"; do # apt's name for an epoch's colon
    dpkg -x "${package/=/_}"_*.deb "$work/root" || fail "cannot unpack $package"
  done
}

# library_folders ROOT: the folders below it that hold libraries, as LD_LIBRARY_PATH has them
library_folders() { find "$1" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:; }
