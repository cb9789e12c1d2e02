#!/usr/bin/env bash
# Prints the path of a Chromium that can be started here, or nothing and, on standard error, why. Never fails.
#
#   CHROME_PATH=$(bash tools/chromium.sh)
#
# It is $CHROME_PATH, else a Chromium or Chrome on the PATH, else, on Linux, Debian's: its packages (about 120 MB, once)
# are unpacked into .chromium/ of this project (delete it to update); see debian_packages.sh. What is printed is then a
# script beside them, which starts the program with its libraries and a font; without one, text would be invisible.
# Ubuntu's package is a snap, of which nothing can be unpacked. FLASH_MLA_CHROMIUM=off has it look for nothing.

set -euo pipefail
say() { echo "chromium: $*" >&2; }
fail() { say "$*; browser tests will be skipped"; exit 0; }
trap '[ $? -eq 0 ] || say "stopped before it was done; browser tests will be skipped"; exit 0' EXIT

runs() { "$1" --version >/dev/null 2>&1 </dev/null; } # a snap's stand-in is there, but fails

# resolve FOLDERS: what the programs and drivers in the unpacked folder load
resolve() { LD_LIBRARY_PATH=$1 ldd "$program"/{chromium,chrome_crashpad_handler,*.so,*.so.[0-9]} 2>&1; }

is_ready() { [ -x "$launcher" ] && runs "$launcher"; }

# All in terms of the launcher's own place, so that the project may move. LD_LIBRARY_PATH and the Vulkan variables are
# those of lavapipe where software_vulkan.sh has run: they are replaced.
write_launcher() {
  cat >"$root/fonts.conf" <<'END'
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <dir prefix="relative">usr/share/fonts</dir>
  <cachedir prefix="xdg">fontconfig</cachedir>
  <alias><family>sans-serif</family><prefer><family>DejaVu Sans</family></prefer></alias>
  <alias><family>system-ui</family><prefer><family>DejaVu Sans</family></prefer></alias>
  <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
END
  cat >"$launcher.$$" <<'END'
#!/usr/bin/env bash
# Written by tools/chromium.sh.
home=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$home/root libraries=
while read -r folder; do libraries+=:$root/$folder; done <"$root/library_folders"
export LD_LIBRARY_PATH=${libraries#:} FONTCONFIG_FILE=$root/fonts.conf XDG_CACHE_HOME=$home/cache
unset VK_DRIVER_FILES VK_ICD_FILENAMES
exec "$root/usr/lib/chromium/chromium" "$@"
END
  chmod +x "$launcher.$$"
  mv "$launcher.$$" "$launcher"
}

unpack() {
  local folders missing
  [ ! -e "$launcher" ] || say 'the Chromium unpacked before does not start here: fetching it again'
  read_release
  begin Chromium -updates -security
  say 'no Chromium: reading package lists, to fetch it (about 120 MB, once)'
  unpack_packages chromium fonts-dejavu-core
  [ -x "$work/root/usr/lib/chromium/chromium" ] || fail "$lacking the package of this system has none in it"

  rm -rf "$root" "$launcher" "$work/root"/usr/share/{doc,icons,locale,man}
  mv "$work/root" "$root"
  folders=$(library_folders "$root")
  tr : '\n' <<<"$folders" | grep -vxF "$program" | sed "s|^$root/||" >"$root/library_folders"
  missing=$(resolve "$folders" | grep -m 1 'not found' || true)
  [ -z "$missing" ] || fail "the unpacked Chromium does not load: $missing"
  write_launcher # last: is_ready() takes it for the sign that all is there
  runs "$launcher" || fail "the unpacked Chromium does not start: $("$launcher" --version 2>&1 </dev/null | head -n 1)"
  say "unpacked $("$launcher" --version 2>/dev/null), $(du -sm "$root" | cut -f 1) MB, into $home"
  cd "$home" && rm -rf "$work"
}

[ "${FLASH_MLA_CHROMIUM:-}" != off ] || fail 'switched off by FLASH_MLA_CHROMIUM'
if [ -n "${CHROME_PATH:-}" ]; then
  runs "$CHROME_PATH" || fail "CHROME_PATH is no program that starts: $CHROME_PATH"
  echo "$CHROME_PATH"
  exit 0
fi
for name in chromium google-chrome google-chrome-stable chromium-browser \
  '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome' /Applications/Chromium.app/Contents/MacOS/Chromium; do
  path=$(command -v "$name" || true)
  if [ -n "$path" ] && runs "$path"; then
    echo "$path"
    exit 0
  fi
done
[[ $OSTYPE == linux* ]] || fail 'no Chromium or Chrome on the PATH'

project=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
home=$project/.chromium lacking='no Chromium, and'
root=$home/root launcher=$home/chromium
program=$root/usr/lib/chromium
if ! is_ready; then
  # shellcheck source=tools/debian_packages.sh
  . "$project/tools/debian_packages.sh"
  claim Chromium
  is_ready || unpack
fi
echo "$launcher"
