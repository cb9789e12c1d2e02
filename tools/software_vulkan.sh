#!/usr/bin/env bash
# Gives a Linux machine without a GPU a software WebGPU adapter: Mesa's lavapipe, a Vulkan driver that runs on the CPU.
#
#   . tools/software_vulkan.sh                     sets up this bash; never makes it exit
#   bash tools/software_vulkan.sh deno test …      sets up, then runs the command
#   eval "$(bash tools/software_vulkan.sh)"        prints the exports, for other shells
#
# It does nothing where a driver is chosen already (VK_DRIVER_FILES, VK_ICD_FILENAMES), where there is a GPU with a
# Vulkan driver, outside Linux, and with FLASH_MLA_SOFTWARE_VULKAN=off. Where something is missing, it says so in a line.
#
# Debian's packages are unpacked into .vulkan/ of this project (delete it to update); see debian_packages.sh. Bookworm's
# Mesa (22.3) is refused by Dawn, hence bookworm-backports (25.0); other releases of Debian and Ubuntu give the Mesa of
# their own. Deno gets DENO_WEBGPU_BACKEND=vulkan, because it would fall back to GL without a word.

# The work is done by a child, which prints the exports: no option or trap of the sourcing shell matters or changes.
if (return 0 2>/dev/null); then
  eval "$("${BASH:-bash}" "${BASH_SOURCE[0]}" </dev/null)"
  return 0
elif [ $# -gt 0 ]; then
  eval "$("$BASH" "$0" </dev/null)"
  exec "$@"
fi

set -euo pipefail
say() { echo "software_vulkan: $*" >&2; }
fail() { say "$*; GPU tests will be skipped"; exit 0; }
trap '[ $? -eq 0 ] || say "stopped before it was done; GPU tests will be skipped"; exit 0' EXIT

# A driver's description proves nothing alone (Mesa installs those of all vendors), nor does a device node (containers
# have /dev/nvidia0 without the driver, virtual displays have render nodes): it takes both, open to this user.
has_gpu() {
  local json node module
  for json in {/etc,/usr/share,/usr/local/etc,/usr/local/share}/vulkan/icd.d/*.json; do
    for node in /dev/nvidia[0-9]* /dev/nvhost-gpu /dev/dri/renderD*; do
      if ! [[ -r $json && -r $node && -w $node ]]; then continue; fi
      module=$(readlink "/sys/class/drm/${node##*/}/device/driver" || true)
      case ${json##*/}:$node:${module##*/} in
        nvidia*:/dev/nv*) return 0 ;;
        lvp_* | nvidia* | *:/dev/nv* | *:nvidia | *:vgem | *:vkms | *:virtio* | *:vmwgfx) ;;
        *) return 0 ;;
      esac
    done
  done
  return 1
}

# resolve FOLDERS: what lavapipe and the loader load, with FOLDERS searched as the exported LD_LIBRARY_PATH is
resolve() { LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$1 ldd "$lib"/*.so* 2>&1; }

loads() { local tree; [ -f "$lib/libvulkan_lvp.so" ] && tree=$(resolve "$lib") && [[ $tree != *'not found'* ]]; }

# describe FROM: writes the driver's description for the loader, which is FROM with the library's present place
describe() {
  printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "%s", %s}}\n' \
    "$lib/libvulkan_lvp.so" "$(grep -o '"api_version": *"[0-9.]*"' "$1")" >"$icd.$$"
  mv "$icd.$$" "$icd"
}

is_ready() { [ -f "$icd" ] && loads && { grep -qF "\"$lib/" "$icd" || describe "$icd"; }; } # describe: the project moved

unpack() {
  local mesa=mesa-vulkan-drivers suites=-updates folders path
  [ ! -e "$icd" ] || say 'the lavapipe unpacked before does not load here: fetching it again'
  read_release
  if [ "$codename" = bookworm ]; then suites+=' -backports' mesa+=/bookworm-backports; fi
  # shellcheck disable=SC2086 # a list
  begin lavapipe $suites
  say 'no GPU: reading package lists, to fetch lavapipe (about 10 MB, once)'
  unpack_packages "$mesa"

  # Kept are lavapipe, the loader, and what these load of the packages; other vendors' drivers are not.
  rm -rf "$home/lavapipe" && mkdir -p "$lib"
  find "$work/root" \( -name libvulkan_lvp.so -o -name libvulkan.so.1 \) -exec cp -L {} "$lib" \;
  folders=$(library_folders "$work/root")
  resolve "$folders" | sed -nE 's/.* => (.*) \(0x[0-9a-f]+\)$/\1/p' | while read -r path; do
    case $path in "$work/root"/*) cp -L "$path" "$lib" ;; esac
  done
  if ! loads; then
    path=$(resolve "$lib" | grep -m 1 'not found' || true)
    rm -rf "$home/lavapipe"
    fail "the unpacked lavapipe does not load, and is removed: $path"
  fi
  path=$(find "$work/root" -name 'lvp_icd*.json' | head -n 1)
  describe "$path" # last: is_ready() takes this file for the sign that all is there
  say "unpacked lavapipe $(dpkg-deb -f mesa-vulkan-drivers_*.deb Version), $(du -sm "$lib" | cut -f 1) MB, into $home"
  cd "$home" && rm -rf "$work"
}

[[ $OSTYPE == linux* && ${FLASH_MLA_SOFTWARE_VULKAN:-} != off ]] || exit 0
[ -z "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] || exit 0
if has_gpu; then exit 0; fi

project=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
home=$project/.vulkan lacking='no GPU, and'
lib=$home/lavapipe/lib icd=$home/lavapipe/icd.json
if ! is_ready; then
  # shellcheck source=tools/debian_packages.sh
  . "$project/tools/debian_packages.sh"
  claim lavapipe
  is_ready || unpack
fi
printf 'export VK_DRIVER_FILES=%q LD_LIBRARY_PATH=%q XDG_RUNTIME_DIR=%q DENO_WEBGPU_BACKEND=vulkan\n' \
  "$icd" "${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$lib" "${XDG_RUNTIME_DIR:-$home/runtime}"
