// Items of absorbed attention.
struct Params {
  blocks: u32,         // of all sequences
  sequenceBlocks: u32, // of one
  blockRows: u32,
  sequenceTokens: u32,
  heads: u32,
  splitKeys: u32,
  maxSplits: u32,
  shard: u32,          // which of the cache's buffers, of how many
  shards: u32,
  capacity: u32,       // most keys of a sequence
  left: i32,
  right: i32,
  lensBase: u32,
  fixed: u32,          // whether splits lie between multiples of their length
}

struct Item {
  sequence: u32, // row of the block table, or of the batch
  row: u32,      // first query row, counted through [tokens, heads]
  rows: u32,     // how many there are, from 1 to BLOCK_ROWS
  keyStart: u32, // first key
  keyEnd: u32,   // one past the last key; equal to keyStart when the rows see none
  diagonal: i32, // the position of row r's token among the keys is diagonal + i32(r / heads)
  slot: u32,     // where the partial result goes, or NO_SLOT: the result is written at once
  pad: u32,
}

struct Merge {
  row: u32,
  rows: u32,
  slot: u32,
  splits: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> lens: array<i32>;
@group(0) @binding(2) var<storage, read_write> items: array<Item>;
@group(0) @binding(3) var<storage, read_write> merges: array<Merge>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var block = id.x; block < params.blocks; block += groups.x * 64u) {
    let sequence = block / params.sequenceBlocks;
    let within = block % params.sequenceBlocks * params.blockRows;
    let row = sequence * params.sequenceTokens * params.heads + within;
    let rows = min(params.blockRows, params.sequenceTokens * params.heads - within);
    // A length that disagrees with the table is cut to what there is.
    let keys = clamp(lens[params.lensBase + sequence], 0, i32(params.capacity));
    let diagonal = keys - i32((sequence + 1u) * params.sequenceTokens);
    let lowest = diagonal + i32(row / params.heads);
    let highest = diagonal + i32((row + rows - 1u) / params.heads);
    let start = min(keys, max(0, lowest - params.left));
    let end = max(start, min(keys, highest + params.right + 1));
    let origin = select(start, start / i32(params.splitKeys) * i32(params.splitKeys), params.fixed != 0u);
    let splits = max(1u, (u32(end - origin) + params.splitKeys - 1u) / params.splitKeys);
    let first = block * params.maxSplits;
    for (var s = 0u; s < params.maxSplits; s += 1u) {
      let low = max(start, origin + i32(s * params.splitKeys));
      let high = min(end, origin + i32((s + 1u) * params.splitKeys));
      let slot = (first + s) * params.shards + params.shard;
      let used = s < splits;
      items[first + s] =
        Item(sequence, row, select(0u, rows, used), u32(low), u32(max(low, high)), diagonal, select(4294967295u, slot, used), 0u);
    }
    merges[block] = Merge(row, rows, first * params.shards, splits * params.shards);
  }
}
