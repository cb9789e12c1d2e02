// Absorption: the weights that rebuild keys and values from latents are multiplied into the query and the result instead.
//
//   q_c[h, l] = Σ_p q_nope[h, p] · wKc[l, g, p]         out[h, v] = Σ_l o[h, l] · wVc[l, g, v]         g = ⌊h / (H/Hkv)⌋

/** One head's q_c, `[kvLoraRank]`. */
export function absorbQuery(
  nope: ArrayLike<number>,
  start: number,
  wKc: { readonly data: ArrayLike<number>; readonly shape: readonly number[] },
  kvHead: number,
  into: Float64Array,
): void {
  const [L, G, P] = wKc.shape;
  for (let l = 0; l < L; l++) {
    const at = (l * G + kvHead) * P;
    let sum = 0;
    for (let p = 0; p < P; p++) sum += nope[start + p] * wKc.data[at + p];
    into[l] = sum;
  }
}

/** One head's result, `[vHeadDim]`. */
export function projectOutput(
  attended: ArrayLike<number>,
  wVc: { readonly data: ArrayLike<number>; readonly shape: readonly number[] },
  kvHead: number,
  into: Float64Array,
): void {
  const [L, G, V] = wVc.shape;
  into.fill(0);
  for (let l = 0; l < L; l++) {
    const at = (l * G + kvHead) * V;
    const factor = attended[l];
    for (let v = 0; v < V; v++) into[v] += factor * wVc.data[at + v];
  }
}
