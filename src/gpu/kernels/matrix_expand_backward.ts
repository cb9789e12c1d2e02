// Gradients of the expansion of latents on matrix units: two GEMMs with f16 factors and f32 sums.
//
//   latents:  ∂c [rows, L]        += ∂K [rows, columns] · wᵀ           w [L, columns], a row of it as long as all heads
//   weights:  ∂w [L, columns]      = cᵀ · ∂K                           c [rows, L]
//
//   tile, subgroups and workgroup memory as in matrix_expand.ts; what lies along the summed axis is loaded in columns
//
// ∂K is scaled by the power of two that brings its largest element to 2^14 … 2^15, which is undone in float32. Parameters and
// the first bindings are those of expand_backward.ts; the partial maxima of matrix_maxima.ts come on top.

import { halfRange, loadHalves } from "./matrix_scratch.ts";
import type { MatrixExpandTile } from "./matrix_expand.ts";
import { partialMaxima } from "./matrix_maxima.ts";
import {
  fragmentQuads,
  fragmentSize,
  type MatrixBackend,
  type MatrixMemory,
  matrixUnit,
  memoryBytes,
  subgroupSize,
} from "./matrix_unit.ts";
import { type ExpandBackwardShape, type ExpandGradient, projectionParams, storeGradient } from "./expand_backward.ts";
import { indent, unroll } from "./register_tile.ts";
import { load4, storageDirectives, type StorageElement } from "./storage_element.ts";

/** What of a call the generated WGSL depends on. */
export interface MatrixExpandBackwardShape extends ExpandBackwardShape {
  /** Whose gradient is projected: which half of the partial maxima counts. */
  readonly side: "keys" | "values";
}

/** Index of the binding of the partial maxima. */
export const maximaBinding = 4;

const ownStride = fragmentSize / 4 + 1;

function layout(which: ExpandGradient, { blockM, blockN, depth, rowFragments, columnFragments }: MatrixExpandTile) {
  const subgroupColumns = blockN / (columnFragments * fragmentSize);
  const subgroups = blockM / (rowFragments * fragmentSize) * subgroupColumns;
  // Latents: both factors lie with the summed axis along their rows. Weights: both across.
  const [leftRows, leftWidth] = which === "latents" ? [blockM, depth] : [depth, blockM];
  const [rightRows, rightWidth] = which === "latents" ? [blockN, depth] : [depth, blockN];
  const memory = (name: string, rows: number, width: number): MatrixMemory => (
    { name, kind: "halves", quads: rows * (width / 8 + 1) }
  );
  const results: MatrixMemory = { name: "results", kind: "floats", quads: subgroups * fragmentSize * ownStride };
  return {
    ...{ subgroupColumns, subgroups, leftRows, leftWidth, rightRows, rightWidth, results },
    left: memory("leftTile", leftRows, leftWidth),
    right: memory("rightTile", rightRows, rightWidth),
  };
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(which: ExpandGradient, tile: MatrixExpandTile): number {
  const { left, right, results, subgroups } = layout(which, tile);
  return memoryBytes([left, right, results]) + 4 * subgroups * subgroupSize;
}

/** The kernel's source. */
export function wgsl(
  which: ExpandGradient,
  tile: MatrixExpandTile,
  shape: MatrixExpandBackwardShape,
  backend: MatrixBackend,
): string {
  const { blockM, blockN, depth, rowFragments, columnFragments } = tile;
  const toLatents = which === "latents";
  const unit = matrixUnit(backend);
  const { subgroupColumns, subgroups, left, right, results, ...sides } = layout(which, tile);
  const size = subgroups * subgroupSize;
  const [leftQuads, rightQuads] = [sides.leftWidth / 8, sides.rightWidth / 8];

  const registersOf = (count: number) => Math.ceil(count / size);
  const pieces = (count: number, emit: (piece: string, i: number) => string) =>
    unroll(registersOf(count), (i) => {
      const piece = i === 0 ? "t" : `t + ${i * size}u`;
      const code = emit(piece, i);
      return (i + 1) * size <= count ? code : `if (${piece} < ${count}u) {\n${indent(code, 2)}\n}`;
    });
  const leftPieces = sides.leftRows * leftQuads;
  const rightPieces = sides.rightRows * rightQuads;
  const load = (slice: string) => {
    const along = (base: string, piece: string, quads: number) =>
      `${base} + (${piece}) / ${quads}u, ${slice} * DEPTH + (${piece}) % ${quads}u * 8u`;
    const across = (base: string, piece: string, quads: number) =>
      `${slice} * DEPTH + (${piece}) / ${quads}u, ${base} + (${piece}) % ${quads}u * 8u`;
    const where = toLatents ? along : across;
    return `${pieces(leftPieces, (piece, i) => `a${i} = loadLeft(${where("rowBase", piece, leftQuads)}, factor);`)}
${pieces(rightPieces, (piece, i) => `b${i} = loadRight(${where("columnBase", piece, rightQuads)}, factor);`)}`;
  };
  const at = (piece: string, quads: number) => `(${piece}) / ${quads}u * ${quads + 1}u + (${piece}) % ${quads}u`;
  const store = `${pieces(leftPieces, (piece, i) => unit.writeQuad(left, at(piece, leftQuads), `a${i}`))}
${pieces(rightPieces, (piece, i) => unit.writeQuad(right, at(piece, rightQuads), `b${i}`))}`;

  const sums = unit.fragments("c", "result", rowFragments, columnFragments);
  /** Where a fragment begins: fragment `f` of the rows or columns, fragment `d` of the summed axis. */
  const fragmentAt = (f: string, d: string, stride: number) =>
    toLatents
      ? `${f} * ${fragmentSize * stride}u + ${d} * ${fragmentQuads}u`
      : `${d} * ${fragmentSize * stride}u + ${f} * ${fragmentQuads}u`;
  const multiply = unit.over("d", depth / fragmentSize, (d) =>
    `${
      unroll(rowFragments, (r) => {
        const offset = fragmentAt(`(subgroupRow * ${rowFragments}u + ${r}u)`, d, leftQuads + 1);
        return `let left${r} = ${unit.loadLeft(left, offset, leftQuads + 1, toLatents ? "row" : "column")};`;
      })
    }
${
      unit.over("n", columnFragments, (n) => {
        const offset = fragmentAt(`(subgroupColumn * ${columnFragments}u + ${n})`, d, rightQuads + 1);
        const fragment = unit.right("rightOne", right, offset, rightQuads + 1, toLatents ? "column" : "row");
        return `${fragment.code}
${unroll(rowFragments, (r) => unit.accumulate(sums.at(`${r}u`, n), `left${r}`, fragment))}`;
      })
    }`);

  const latentRow = `params.leftBase + row * params.leftRow${
    shape.gapped && !toLatents ? " + (row / params.leftItemRows) * params.leftGap" : ""
  }`;
  /** A function that loads eight neighbours as halves, zeros where there are none; its loads stand outside of branches. */
  const eight = (name: string, rows: string, columns: string, offset: string, value: string) =>
    `fn ${name}(wantedRow: u32, wantedColumn: u32, factor: f32) -> vec4<u32> {
  let exists = wantedRow < params.${rows} && wantedColumn < params.${columns};
  let row = select(0u, wantedRow, exists);
  let column = select(0u, wantedColumn, exists);
  let offset = ${offset};
  return select(vec4<u32>(), ${value}, exists);
}`;
  const rightRow = "params.rightBase + row * params.rightRow";
  /** ∂K, scaled. */
  const scaled = (buffer: string, element: StorageElement, width: string) => {
    const more = `column + 4u < ${width}`;
    const low = load4(buffer, element, "offset", "column", width);
    const high = load4(buffer, element, "offset", `select(column, column + 4u, ${more})`, width);
    return `packHalves(saturated(factor * ${low}), select(vec4<f32>(), saturated(factor * ${high}), ${more}))`;
  };
  const loads = toLatents
    ? `${eight("loadLeft", "rows", "depth", latentRow, scaled("leftRows", shape.left, "params.depth"))}

${
      eight(
        "loadRight",
        "columns",
        "depth",
        rightRow,
        loadHalves("rightRows", shape.right, "offset", "column", "params.depth", unit.native),
      )
    }`
    : `// Latents of a row that nobody saw may hold anything; where the row was seen, it comes back through ∂K.
${
      eight(
        "loadLeft",
        "depth",
        "rows",
        latentRow,
        `finiteHalves(${loadHalves("leftRows", shape.left, "offset", "column", "params.rows", unit.native)})`,
      )
    }

${eight("loadRight", "depth", "columns", rightRow, scaled("rightRows", shape.right, "params.columns"))}`;

  return `${
    unit.native ? unit.directives : storageDirectives([shape.left, shape.right])
  }// Gradient of the expansion: ${
    toLatents ? "latents += ∂K · wᵀ" : "weights = cᵀ · ∂K"
  }, on matrix units. ${blockM} × ${blockN}, depth ${depth}
const BLOCK_M = ${blockM}u;
const BLOCK_N = ${blockN}u;
const DEPTH = ${depth}u;

${projectionParams}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> leftRows: array<${shape.left}>;
@group(0) @binding(2) var<storage, read> rightRows: array<${shape.right}>;
@group(0) @binding(3) var<storage, read_write> gradient: array<${shape.gradient}>;
@group(0) @binding(${maximaBinding}) var<storage, read> maxima: array<f32>; // of ∂K, then of ∂V

${unit.declarations([left, right, results])}
var<workgroup> most: array<f32, ${size}>;

${halfRange}

${loads}

${storeGradient(shape)}

@compute @workgroup_size(${size})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
${unit.prologue}
  let rowBase = (params.firstTile + workgroup.y) * BLOCK_M;
  let columnBase = workgroup.x * BLOCK_N;
  let subgroupRow = subgroup / ${subgroupColumns}u;
  let subgroupColumn = subgroup % ${subgroupColumns}u;
  let slices = (params.depth + DEPTH - 1u) / DEPTH;

  var own = 0.0;
  for (var i = t; i < ${partialMaxima}u; i += ${size}u) { own = max(own, maxima[${
    shape.side === "values" ? `${partialMaxima}u + ` : ""
  }i]); }
  most[t] = own;
  for (var count = ${size / 2}u; count > 0u; count /= 2u) {
    workgroupBarrier();
    if (t < count) { most[t] = max(most[t], most[t + count]); }
  }
  workgroupBarrier();
  // The largest is below 2^exponent; factors are powers of two within what float32 has.
  let exponent = clamp(i32(bitcast<u32>(most[0]) >> 23u) - 126, -100, 100);
  let factor = bitcast<f32>(u32(15 - exponent + 127) << 23u);
  let inverse = bitcast<f32>(u32(exponent - 15 + 127) << 23u);

${indent(sums.declaration, 2)}
${unroll(registersOf(leftPieces), (i) => `  var a${i} = vec4<u32>();`)}
${unroll(registersOf(rightPieces), (i) => `  var b${i} = vec4<u32>();`)}
${indent(load("0u"), 2)}
  for (var slice = 0u; slice < slices; slice += 1u) {
${indent(store, 4)}
    workgroupBarrier();
    if (slice + 1u < slices) { // a branch for the driver's sake: see matrix_expand.ts
${indent(load("(slice + 1u)"), 6)}
    }
${indent(multiply, 4)}
    workgroupBarrier();
  }

  let part = subgroup * ${fragmentSize * ownStride}u;
${
    indent(
      unit.over("r", rowFragments, (r) =>
        unit.over("n", columnFragments, (n) =>
          `${unit.storeResult(results, "part", ownStride, sums.at(r, n))}
workgroupBarrier();
${
            unroll(2, (i) =>
              `{
  let ownRow = (lane + ${i * subgroupSize}u) / 4u;
  let ownQuad = (lane + ${i * subgroupSize}u) % 4u;
  let row = rowBase + (subgroupRow * ${rowFragments}u + ${r}) * 16u + ownRow;
  let column = columnBase + (subgroupColumn * ${columnFragments}u + ${n}) * 16u + 4u * ownQuad;
  put(row, column, inverse * ${unit.readQuad(results, `part + ownRow * ${ownStride}u + ownQuad`)});
}`)
          }
workgroupBarrier();`)),
      2,
    )
  }
}
`;
}
