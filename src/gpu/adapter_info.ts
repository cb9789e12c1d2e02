// What is known of the adapter behind a device. Devices name it themselves, but not everything: Dawn's leave out the
// subgroup matrices that their adapter lists.

const infos = new WeakMap<GPUDevice, GPUAdapterInfo>();

/** Remembers the adapter that a device was opened on. */
export function rememberAdapter(device: GPUDevice, info: GPUAdapterInfo): void {
  infos.set(device, info);
}

/** The adapter of a device: as it was opened by us, or as the device tells. */
export function adapterInfoOf(device: GPUDevice): GPUAdapterInfo | undefined {
  return infos.get(device) ?? device.adapterInfo;
}
