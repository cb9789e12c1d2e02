// A linear layer of a few rows, as decoding has them: rows [M, K] × weight [K, N], M up to a handful.
//
//   one workgroup = columnQuads quads of columns × up to `rows` rows; 256 invocations
//   invocation (lane, quad) sums every (256 / columnQuads)-th run of four weight rows; the lanes are added up in the end, the
//   sums of four rows at a time
//   workgroup memory: min(rows, 4) · 256 vec4   (4 rows and more: 16 KiB, the default limit)
//
// What counts is that each weight is read once, by neighbours along its rows: 16 quads are 256 bytes in float32 and 128 in
// halves. Narrow layers take fewer quads to a workgroup, so that there are enough workgroups to draw on the memory.

import { biasDeclaration } from "./expand.ts";
import { indent, unroll } from "./register_tile.ts";
import { load4, storageDirectives, type StorageElement, store4 } from "./storage_element.ts";

/** The tile of one kernel. */
export interface LinearRowsTile {
  /** Quads of columns of a workgroup: a power of two from 4 to 16. */
  readonly columnQuads: number;
  /** Rows of a workgroup: 1, 2, 4 or 8. */
  readonly rows: number;
}

/** What of a call the generated WGSL depends on; sizes are read at run time. */
export interface LinearRowsShape {
  /** Rows as they are stored. */
  readonly left: StorageElement;
  /** The weight as it is stored. */
  readonly weight: StorageElement;
  /** Results as they are to be stored. */
  readonly result: StorageElement;
  /** Whether batch items of rows lie apart, so that finding a row takes a division. */
  readonly gapped: boolean;
  /** Whether a row of float32 is added to each row of the result. */
  readonly bias: boolean;
}

/** Invocations of a workgroup. */
export const workgroupSize = 256;

/** Rows whose sums are in workgroup memory at a time. */
const roundRows = 4;

/** Workgroups that keep a data-centre card's memory busy. */
const wantedWorkgroups = 128;

/** The tile for a layer of so many rows and columns. */
export function linearRowsTile(rows: number, columns: number): LinearRowsTile {
  const quads = Math.ceil(columns / 4);
  const columnQuads = [16, 8].find((count) => quads / count >= wantedWorkgroups) ?? 4;
  return { columnQuads, rows: [1, 2, 4].find((count) => rows <= count) ?? 8 };
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes({ rows }: LinearRowsTile): number {
  return Math.min(rows, roundRows) * 16 * workgroupSize;
}

/** The kernel's source. Workgroups: columns along x, rows along y. */
export function wgsl({ columnQuads, rows }: LinearRowsTile, shape: LinearRowsShape): string {
  const lanes = workgroupSize / columnQuads;
  const held = Math.min(rows, roundRows);
  const everyRow = (emit: (r: number) => string) => unroll(rows, emit);
  const everyStep = (emit: (j: number) => string) => unroll(4, emit);
  return `${storageDirectives([shape.left, shape.weight, shape.result])}// Up to ${rows} row(s) × a weight, ${
    4 * columnQuads
  } columns to a workgroup
const ROWS = ${rows}u;
const QUADS = ${columnQuads}u;
const LANES = ${lanes}u;

struct Params {
  rows: u32,
  columns: u32,  // N
  depth: u32,    // K
  leftBase: u32, // elements from the binding's start to the first row
  leftRow: u32,  // elements from one row to the next
  leftRows: u32, // rows of a batch item
  leftGap: u32,  // further elements from one batch item to the next, modulo 2^32
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> left: array<${shape.left}>;
@group(0) @binding(2) var<storage, read> weight: array<${shape.weight}>;
@group(0) @binding(3) var<storage, read_write> result: array<${shape.result}>;
${shape.bias ? biasDeclaration : ""}
var<workgroup> sums: array<array<vec4<f32>, ${workgroupSize}>, ${held}>;

fn loadLeft(row: u32, k: u32) -> vec4<f32> {
  let offset = params.leftBase + row * params.leftRow${
    shape.gapped ? " + (row / params.leftRows) * params.leftGap" : ""
  };
  return ${load4("left", shape.left, "offset", "k", "params.depth")};
}

// Past the depth the rows are zeros, and any weight will do.
fn loadWeight(k: u32, column: u32) -> vec4<f32> {
  let offset = min(k, params.depth - 1u) * params.columns;
  return ${load4("weight", shape.weight, "offset", "column", "params.columns")};
}

fn store(row: u32, column: u32, sum: vec4<f32>) {
  if (row >= params.rows) { return; }
${
    indent(
      store4(
        "result",
        shape.result,
        "row * params.columns",
        "column",
        "params.columns",
        shape.bias ? "(sum + biasAt(column))" : "sum",
      ),
      2,
    )
  }
}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let quad = t % QUADS;
  let lane = t / QUADS;
  let column = 4u * (workgroup.x * QUADS + quad);
  let firstRow = workgroup.y * ROWS;
${everyRow((r) => `  var sum${r} = vec4<f32>();\n  let row${r} = min(firstRow + ${r}u, params.rows - 1u);`)}
  if (column < params.columns) {
    for (var k = 4u * lane; k < params.depth; k += 4u * LANES) {
${indent(everyRow((r) => `let left${r} = loadLeft(row${r}, k);`), 6)}
${indent(everyStep((j) => `let weight${j} = loadWeight(k + ${j}u, column);`), 6)}
${
    indent(
      everyStep((j) => everyRow((r) => `sum${r} = fma(vec4<f32>(left${r}[${j}]), weight${j}, sum${r});`)),
      6,
    )
  }
    }
  }
${
    unroll(Math.ceil(rows / held), (round) =>
      `${round === 0 ? "" : "  workgroupBarrier();\n"}${
        unroll(held, (i) =>
          `  sums[${i}][t] = sum${round * held + i};`)
      }
  workgroupBarrier();
  if (t < ${held}u * QUADS) {
    var total = vec4<f32>();
    for (var i = 0u; i < LANES; i += 1u) { total += sums[t / QUADS][i * QUADS + t % QUADS]; }
    store(firstRow + ${round * held}u + t / QUADS, 4u * (workgroup.x * QUADS + t % QUADS), total);
  }`)
  }
}
`;
}
