// Bind groups by what they bind. Calls alike borrow the same memory one after another, and making a group costs an engine 20 µs
// and more: a decoding step of a model's layer has a dozen of them, and its kernels run for 80 µs.

/** Groups that are remembered. With memory that changes all the time none would be asked for again: then all are forgotten. */
const mostGroups = 4096;

/** A place in the tree whose branches are a pipeline and, one after another, the buffers that are bound. */
class Branch {
  /** Held as long as the buffers live: forgetting a buffer forgets the groups that bind it. */
  readonly next = new WeakMap<object, Branch>();
  /** The groups of these buffers, by label and by what of the buffers they bind. */
  readonly groups = new Map<string, GPUBindGroup>();
}

/** What to bind, by binding. */
export type BoundBuffers = readonly { readonly binding: number; readonly resource: GPUBufferBinding }[];

/** The bind groups of one device. */
export class BindGroupCache {
  readonly #device: GPUDevice;
  #root = new Branch();
  #size = 0;

  /** @param device The device. */
  constructor(device: GPUDevice) {
    this.#device = device;
  }

  /** Groups made since all were forgotten. */
  get size(): number {
    return this.#size;
  }

  /** The group that binds these, if it was made before. */
  find(pipeline: GPUComputePipeline, label: string, entries: BoundBuffers): GPUBindGroup | undefined {
    let branch = this.#root.next.get(pipeline);
    for (let i = 0; branch !== undefined && i < entries.length; i++) {
      branch = branch.next.get(entries[i].resource.buffer);
    }
    return branch?.groups.get(leafKey(label, entries));
  }

  /** The same, made if need be: between error scopes, since an engine may refuse. */
  get(pipeline: GPUComputePipeline, label: string, entries: BoundBuffers): GPUBindGroup {
    const found = this.find(pipeline, label, entries);
    if (found !== undefined) return found;
    if (this.#size >= mostGroups) this.clear();
    const layout = pipeline.getBindGroupLayout(0);
    const made = this.#device.createBindGroup({ label: `flash-mla ${label}`, layout, entries: [...entries] });
    let branch = this.#branch(this.#root, pipeline);
    for (const { resource } of entries) branch = this.#branch(branch, resource.buffer);
    branch.groups.set(leafKey(label, entries), made);
    this.#size++;
    return made;
  }

  /** Forgets all: one of them may be what an engine refused. */
  clear(): void {
    this.#root = new Branch();
    this.#size = 0;
  }

  #branch(from: Branch, by: object): Branch {
    let branch = from.next.get(by);
    if (branch === undefined) from.next.set(by, branch = new Branch());
    return branch;
  }
}

function leafKey(label: string, entries: BoundBuffers): string {
  let key = label;
  for (const { binding, resource: { offset = 0, size = -1 } } of entries) key += ` ${binding}:${offset}+${size}`;
  return key;
}
