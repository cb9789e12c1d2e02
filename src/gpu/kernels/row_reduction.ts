// Maxima and sums over the invocations that share a row: TX neighbours along the invocation index.
//
// Through workgroup memory: everyone stores, a barrier, everyone reads all TX values; for maxima another barrier, since
// the memory is used again. By subgroup shuffles: log2(TX) exchanges between registers and no barrier at all. The shuffles
// need TX neighbours in one subgroup, which holds when TX is a power of two that divides the smallest subgroup.

import { unroll } from "./register_tile.ts";

/** How rows are laid over invocations. */
export interface RowExchange {
  /** Whether to shuffle. */
  readonly subgroups: boolean;
  /** TX. */
  readonly threadColumns: number;
  /** Depth of a probability slice, the middle axis of the workgroup array `probs`. */
  readonly depth: number;
  /** Row quads of one invocation. */
  readonly rowQuads: number;
  /** WGSL index of row quad r within the block. */
  rowQuad(r: number): string;
}

/** WGSL statements that turn `newMax{r}`, each invocation's own, into the row's, `rowMax{r}` included. */
export function rowMaximum(exchange: RowExchange): string {
  const { subgroups, rowQuads } = exchange;
  if (subgroups) {
    return unroll(
      rowQuads,
      (r) =>
        shuffled(exchange, (mask) => `newMax${r} = max(newMax${r}, subgroupShuffleXor(newMax${r}, ${mask}u));`) +
        `\nnewMax${r} = max(newMax${r}, rowMax${r});`,
    );
  }
  return `${unroll(rowQuads, (r) => `${slot(exchange, "tx", r)} = newMax${r};`)}
workgroupBarrier();
${
    unroll(rowQuads, (r) =>
      `newMax${r} = rowMax${r};\n${
        everyColumn(exchange, r, (value) => `newMax${r} = max(newMax${r}, ${value});`)
      }`)
  }
workgroupBarrier();`;
}

/** WGSL statements that declare `total{r}`, the sum of every invocation's `rowSum{r}`. */
export function rowTotal(exchange: RowExchange): string {
  const { subgroups, rowQuads } = exchange;
  if (subgroups) {
    return unroll(rowQuads, (r) =>
      `var total${r} = rowSum${r};\n` +
      shuffled(exchange, (mask) => `total${r} += subgroupShuffleXor(total${r}, ${mask}u);`));
  }
  return `${unroll(rowQuads, (r) => `${slot(exchange, "tx", r)} = rowSum${r};`)}
workgroupBarrier();
${
    unroll(rowQuads, (r) =>
      `var total${r} = vec4<f32>();\n${everyColumn(exchange, r, (value) => `total${r} += ${value};`)}`)
  }`;
}

function shuffled({ threadColumns }: RowExchange, step: (mask: number) => string): string {
  return unroll(Math.log2(threadColumns), (i) => step(threadColumns >> (i + 1)));
}

function slot({ rowQuad }: RowExchange, column: string, r: number): string {
  return `probs[${column} / DEPTH][${column} % DEPTH][${rowQuad(r)}]`;
}

function everyColumn(
  { threadColumns, depth, rowQuad }: RowExchange,
  r: number,
  use: (value: string) => string,
): string {
  return unroll(threadColumns, (x) => use(`probs[${Math.floor(x / depth)}][${x % depth}][${rowQuad(r)}]`));
}
