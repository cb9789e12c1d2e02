// An open checkpoint: tensors by name, of which only what is asked for is read.

import { FlashMLAError } from "../op/errors.ts";
import type { HostTensor } from "../op/tensor.ts";
import type { BlockScales } from "./fp8.ts";
import { cannotRead, shown } from "./refusal.ts";
import type { SafetensorsFile } from "./safetensors_file.ts";
import type { TensorPlace } from "./safetensors_header.ts";
import type { TensorFiles } from "./sharded_index.ts";
import { SCALED_DTYPE, storedScales, storedTensor, whyUnreadable, whyUnscalable } from "./stored_elements.ts";

/** How a checkpoint stores a tensor. */
export interface StoredTensor {
  /** The element type as the format names it, such as `BF16`, `F8_E4M3` or `I64`. */
  readonly dtype: string;
  /** The axis lengths. */
  readonly shape: readonly number[];
  /** How many bytes it takes in the file. */
  readonly bytes: number;
}

/**
 * An open checkpoint. Tensors are read when they are asked for, and only they are. Every method that reads rejects with a
 * {@link FlashMLAError} of code `invalid-input` when a file is missing, damaged, cut short or closed.
 */
export interface Checkpoint {
  /** The names of all tensors: in the order of their bytes, or in the order of the index. */
  readonly names: readonly string[];
  /** The strings under `__metadata__`; of an index, its metadata, numbers as text. */
  readonly metadata: Readonly<Record<string, string>>;
  /**
   * Whether there is a tensor of a name.
   *
   * @param name The name.
   * @returns Whether there is.
   */
  has(name: string): boolean;
  /**
   * How a tensor is stored, whatever its element type. With an index, this opens the tensor's file and reads its header.
   *
   * @param name The tensor's name.
   * @returns Its element type, shape and size.
   */
  info(name: string): Promise<StoredTensor>;
  /**
   * Reads a tensor into memory of its own. `F32`, `F16` and `BF16` stay what they are. `F8_E4M3` becomes float32, times
   * the scales under the tensor's name followed by `_scale_inv`, where there are such. Other types are refused.
   *
   * @param name The tensor's name.
   * @returns The tensor.
   */
  tensor(name: string): Promise<HostTensor>;
  /**
   * Reads several tensors, neighbours together. Nothing is read when one of them is missing or of another type.
   *
   * @param which Their names, or what says of each name whether it is wanted.
   * @returns The tensors by name, in the order of the names.
   */
  tensors(which: Iterable<string> | ((name: string) => boolean)): Promise<Map<string, HostTensor>>;
  /** Closes its files. What was read stays; calling it twice does no harm. */
  close(): Promise<void>;
  /** The same as `close`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void>;
}

/** A tensor to read, and what it needs. */
interface Wanted {
  readonly file: SafetensorsFile;
  readonly place: TensorPlace;
  readonly scales?: { readonly file: SafetensorsFile; readonly place: TensorPlace };
}

/**
 * Makes a checkpoint of its files.
 *
 * @param files The files.
 * @param block Rows and columns of an eight-bit tensor that share a scale.
 * @returns The checkpoint, which closes the files with itself.
 */
export function checkpointOf(files: TensorFiles, block: BlockScales["block"]): Checkpoint {
  const names = new Set(files.names);
  let closing: Promise<void> | undefined;

  async function find(name: string): Promise<{ file: SafetensorsFile; place: TensorPlace }> {
    if (closing !== undefined) cannotRead(files.name, "it was closed");
    if (!names.has(name)) {
      const some = files.names.slice(0, 3).map(shown).join(", ");
      cannotRead(files.name, `expected one of its ${names.size} tensors${some && ` (${some} …)`}, got ${shown(name)}`);
    }
    const file = await files.fileOf(name);
    return { file, place: file.tensors.get(name)! };
  }

  async function want(name: string): Promise<Wanted> {
    const { file, place } = await find(name);
    const fail = (why: string) => cannotRead(file.name, `tensor ${shown(name)}: ${why}`);
    const unreadable = whyUnreadable(place);
    if (unreadable !== undefined) fail(unreadable);
    const scaleName = `${name}_scale_inv`;
    if (place.dtype !== SCALED_DTYPE || !names.has(scaleName)) return { file, place };
    const scales = await find(scaleName);
    const unscalable = whyUnscalable(place, scales.place, block);
    if (unscalable !== undefined) fail(unscalable);
    return { file, place, scales };
  }

  async function tensors(which: Iterable<string> | ((name: string) => boolean)): Promise<Map<string, HostTensor>> {
    // Everything is known to be readable before anything is read.
    const wanted: Wanted[] = [];
    for (const name of asked(files, which)) wanted.push(await want(name));
    const bytes = await readAll(wanted);
    const read = new Map<string, HostTensor>();
    for (const { place, scales } of wanted) {
      const by = scales && storedScales(scales.place, bytes.get(scales.place)!, block);
      read.set(place.name, storedTensor(place, bytes.get(place)!, by));
    }
    return read;
  }

  const close = () => closing ??= files.close();
  return {
    names: files.names,
    metadata: files.metadata,
    has: (name) => names.has(name),
    async info(name) {
      const { dtype, shape, start, end } = (await find(name)).place;
      return { dtype, shape: [...shape], bytes: end - start };
    },
    tensor: async (name) => (await tensors([name])).get(name)!,
    tensors,
    close,
    [Symbol.asyncDispose]: close,
  };
}

/** The names that a caller asks for, each once. */
function asked(files: TensorFiles, which: Iterable<string> | ((name: string) => boolean)): Iterable<string> {
  if (typeof which === "function") return files.names.filter((name) => which(name));
  if (typeof which === "object" && which !== null && Symbol.iterator in which) return new Set(which);
  throw new FlashMLAError("invalid-input", `Cannot read tensors: expected names or a function, got ${shown(which)}`);
}

/** The bytes of tensors and of their scales, file by file. */
async function readAll(wanted: readonly Wanted[]): Promise<Map<TensorPlace, Uint8Array<ArrayBuffer>>> {
  const places = new Map<SafetensorsFile, Set<TensorPlace>>();
  for (const { file, place } of wanted.flatMap((tensor) => tensor.scales ? [tensor, tensor.scales] : [tensor])) {
    places.set(file, (places.get(file) ?? new Set()).add(place));
  }
  const read = new Map<TensorPlace, Uint8Array<ArrayBuffer>>();
  for (const [file, inFile] of places) {
    const bytes = await file.read([...inFile]);
    for (const place of inFile) read.set(place, bytes.get(place.name)!);
  }
  return read;
}
