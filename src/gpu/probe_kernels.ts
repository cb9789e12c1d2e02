// The kernels that a device is probed with, and what their results have to be.

import {
  fragmentSize,
  type MatrixBackend,
  type MatrixMemory,
  matrixUnit,
  subgroupSize,
} from "./kernels/matrix_unit.ts";

/** A kernel whose results are known before it runs. Binding 0 takes its result, which starts as zeros. */
export interface ProbeKernel {
  /** WGSL; the entry point is `main`. */
  readonly code: string;
  /** Workgroups along x. */
  readonly workgroups: number;
  /** 32-bit words of its result. */
  readonly words: number;
  /** Whether binding 1 is scratch memory of as many words. */
  readonly scratch?: boolean;
}

const lanes = 64;

/** Integers are mixed and exchanged through workgroup memory; the floats are exact in f32: i/2 · (0 + 1 + … + 15) − 1/4. */
export const arithmetic: ProbeKernel = {
  workgroups: 2,
  words: 2 * 2 * lanes,
  code: `
@group(0) @binding(0) var<storage, read_write> result: array<vec2<u32>>;
var<workgroup> mixed: array<u32, ${lanes}>;
@compute @workgroup_size(${lanes})
fn main(@builtin(local_invocation_index) i: u32, @builtin(global_invocation_id) id: vec3<u32>) {
  let x = id.x * 747796405u + 2891336453u;
  mixed[i] = (x ^ (x >> 9u)) * 277803737u;
  workgroupBarrier();
  var sum = 0.0;
  for (var k = 0u; k < 16u; k++) {
    sum = fma(f32(k), f32(i) * 0.5, sum);
  }
  result[id.x] = vec2<u32>(mixed[${lanes - 1}u - i], bitcast<u32>(sum - 0.25));
}
`,
};

/** Whether the words that {@link arithmetic} wrote are the right ones. */
export function arithmeticIsRight(words: Uint32Array<ArrayBuffer>): boolean {
  const floats = new Float32Array(words.buffer, words.byteOffset, words.length);
  return words.every((word, at) => {
    const id = at >> 1;
    const i = id % lanes;
    if (at % 2 === 1) return floats[at] === i * 60 - 0.25;
    const x = (Math.imul(id - i + lanes - 1 - i, 747796405) + 2891336453) >>> 0;
    return word === Math.imul(x ^ (x >>> 9), 277803737) >>> 0;
  });
}

/** Values that f16 holds exactly, computed, stored as vec4<f16>, and read back by another invocation. */
export const halves: ProbeKernel = {
  workgroups: 1,
  words: 4 * lanes,
  scratch: true,
  code: `enable f16;
@group(0) @binding(0) var<storage, read_write> result: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> stored: array<vec4<f16>>;
@compute @workgroup_size(${lanes})
fn main(@builtin(local_invocation_index) i: u32) {
  let x = f16(i & 31u);
  stored[i] = vec4<f16>(x, x * x, fma(x, 0.5h, -0.25h), dot(vec4<f16>(x), vec4<f16>(1.0h, 2.0h, 3.0h, 4.0h)));
  storageBarrier();
  result[i] = vec4<f32>(stored[${lanes - 1}u - i]);
}
`,
};

/** Whether the words that {@link halves} wrote are the right ones. */
export function halvesAreRight(words: Uint32Array<ArrayBuffer>): boolean {
  const floats = new Float32Array(words.buffer, words.byteOffset, words.length);
  return floats.every((value, at) => {
    const x = (lanes - 1 - (at >> 2)) & 31;
    return value === [x, x * x, x / 2 - 0.25, 10 * x][at % 4];
  });
}

/** The exchanges that a subgroup of up to 128 invocations may ask for. */
const masks = [1, 2, 4, 8, 16, 32, 64];

/** Each invocation writes its subgroup's size, its place in it, and a bit for every mask whose exchange came out right. */
export function subgroups(workgroupSize: number, directive: boolean): ProbeKernel {
  return {
    workgroups: 2,
    words: 4 * 2 * workgroupSize,
    code: `${directive ? "enable subgroups;" : ""}
@group(0) @binding(0) var<storage, read_write> result: array<vec4<u32>>;
fn value(i: u32) -> vec4<f32> {
  return vec4<f32>(f32(i), f32(i) + 0.25, -f32(i), f32(i) * 3.0);
}
@compute @workgroup_size(${workgroupSize})
fn main(
  @builtin(local_invocation_index) i: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(subgroup_size) size: u32,
  @builtin(subgroup_invocation_id) place: u32,
) {
  var right = 0u;
${
      masks.map((mask) =>
        `  right |= select(0u, ${mask}u, all(subgroupShuffleXor(value(i), ${mask}u) == value(i ^ ${mask}u)));`
      ).join("\n")
    }
  result[group.x * ${workgroupSize}u + i] = vec4<u32>(size, place, right, 1u);
}
`,
  };
}

/** The sizes seen, or none when a subgroup is not what our kernels take it for: neighbours, as many as a power of two. */
export function subgroupSizes(workgroupSize: number, words: Uint32Array): number[] {
  const sizes = new Set<number>();
  for (let at = 0; at < words.length; at += 4) {
    const [size, place, right, ran] = words.subarray(at, at + 4);
    const index = (at / 4) % workgroupSize;
    const needed = masks.filter((mask) => mask < size).reduce((sum, mask) => sum + mask, 0);
    const isPower = size >= 1 && size <= 128 && (size & (size - 1)) === 0;
    if (ran !== 1 || !isPower || place !== index % size || (right & needed) !== needed) return [];
    sizes.add(size);
  }
  return [...sizes];
}

/** Two matrices of small whole numbers, of which every product and sum is exact in any precision. */
const leftElement = (row: number, k: number) => (3 * row + 5 * k) % 7 - 3;
const rightElement = (k: number, column: number) => (2 * k + 3 * column) % 5 - 2;

/** One product of fragments through workgroup memory, by one subgroup. */
export function matrixProduct(backend: MatrixBackend): ProbeKernel {
  const unit = matrixUnit(backend);
  const factors: MatrixMemory = { name: "factors", kind: "halves", quads: 4 * fragmentSize };
  const product: MatrixMemory = { name: "product", kind: "floats", quads: 4 * fragmentSize };
  const result = unit.fragments("sum", "result", 1, 1);
  const right = unit.right("right", factors, `${2 * fragmentSize}u`, 2, "row");
  const eight = (element: string) =>
    `packHalves(${[0, 4].map((k) => `vec4<f32>(${[0, 1, 2, 3].map((i) => `${element}(row, first + ${k + i}u)`)})`)})`;
  return {
    workgroups: 1,
    words: fragmentSize * fragmentSize,
    code: `${unit.directives}
@group(0) @binding(0) var<storage, read_write> result: array<vec4<f32>>;
${unit.declarations([factors, product])}
fn leftElement(row: u32, k: u32) -> f32 { return f32((3u * row + 5u * k) % 7u) - 3.0; }
fn rightElement(k: u32, column: u32) -> f32 { return f32((2u * k + 3u * column) % 5u) - 2.0; }
@compute @workgroup_size(${subgroupSize})
fn main(@builtin(local_invocation_index) t: u32) {
${unit.prologue}
  let row = t / 2u;
  let first = t % 2u * 8u;
  ${unit.writeQuad(factors, "t", eight("leftElement"))}
  ${unit.writeQuad(factors, `${2 * fragmentSize}u + t`, eight("rightElement"))}
  workgroupBarrier();
${result.declaration}
  ${result.at("0u", "0u")} = ${unit.zero};
  let left = ${unit.loadLeft(factors, "0u", 2)};
  ${right.code}
  ${unit.accumulate(result.at("0u", "0u"), "left", right)}
  ${unit.storeResult(product, "0u", 4, result.at("0u", "0u"))}
  workgroupBarrier();
  result[2u * t] = ${unit.readQuad(product, "2u * t")};
  result[2u * t + 1u] = ${unit.readQuad(product, "2u * t + 1u")};
}
`,
  };
}

/** Whether the words that {@link matrixProduct} wrote are the right ones. */
export function matrixProductIsRight(words: Uint32Array<ArrayBuffer>): boolean {
  const floats = new Float32Array(words.buffer, words.byteOffset, words.length);
  return floats.every((value, at) => {
    let expected = 0;
    for (let k = 0; k < fragmentSize; k++) {
      expected += leftElement(Math.floor(at / fragmentSize), k) * rightElement(k, at % fragmentSize);
    }
    return value === expected;
  });
}
