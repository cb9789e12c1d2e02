enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);
@group(0) @binding(0) var<storage, read_write> sink: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>, 1024>;
@group(0) @binding(2) var<uniform> iterations: vec4<u32>; // in x
var<workgroup> factors: array<f16, 1536>;
var<workgroup> product: array<f32, 2048>;

// Eight halves, rounded to nearest.
fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(bitcast<vec2<u32>>(vec4<f16>(low)), bitcast<vec2<u32>>(vec4<f16>(high)));
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % 32u;
  let subgroup = t / 32u;
  if (t < 192u) {
    let quad = packHalves(inputs[2u * t] - 0.5, inputs[2u * t + 1u] - 0.5);
    factors[8u * (t) + 0u] = f16(unpack2x16float(quad[0])[0]);
    factors[8u * (t) + 1u] = f16(unpack2x16float(quad[0])[1]);
    factors[8u * (t) + 2u] = f16(unpack2x16float(quad[1])[0]);
    factors[8u * (t) + 3u] = f16(unpack2x16float(quad[1])[1]);
    factors[8u * (t) + 4u] = f16(unpack2x16float(quad[2])[0]);
    factors[8u * (t) + 5u] = f16(unpack2x16float(quad[2])[1]);
    factors[8u * (t) + 6u] = f16(unpack2x16float(quad[3])[0]);
    factors[8u * (t) + 7u] = f16(unpack2x16float(quad[3])[1]);
  }
  workgroupBarrier();
  var left0_0: subgroup_matrix_left<f16, 16, 16>;
  var left1_0: subgroup_matrix_left<f16, 16, 16>;
  var sum0_0: subgroup_matrix_result<f32, 16, 16>;
  var sum0_1: subgroup_matrix_result<f32, 16, 16>;
  var sum0_2: subgroup_matrix_result<f32, 16, 16>;
  var sum0_3: subgroup_matrix_result<f32, 16, 16>;
  var sum1_0: subgroup_matrix_result<f32, 16, 16>;
  var sum1_1: subgroup_matrix_result<f32, 16, 16>;
  var sum1_2: subgroup_matrix_result<f32, 16, 16>;
  var sum1_3: subgroup_matrix_result<f32, 16, 16>;
  left0_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>>(&factors, (0u) * 8u, false, 16u);
  left1_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>>(&factors, (32u) * 8u, false, 16u);
  let right0 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&factors, (64u) * 8u, false, 16u);
  let right1 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&factors, (96u) * 8u, false, 16u);
  let right2 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&factors, (128u) * 8u, false, 16u);
  let right3 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&factors, (160u) * 8u, false, 16u);
  sum0_0 = subgroup_matrix_result<f32, 16, 16>();
  sum0_1 = subgroup_matrix_result<f32, 16, 16>();
  sum0_2 = subgroup_matrix_result<f32, 16, 16>();
  sum0_3 = subgroup_matrix_result<f32, 16, 16>();
  sum1_0 = subgroup_matrix_result<f32, 16, 16>();
  sum1_1 = subgroup_matrix_result<f32, 16, 16>();
  sum1_2 = subgroup_matrix_result<f32, 16, 16>();
  sum1_3 = subgroup_matrix_result<f32, 16, 16>();
  for (var i = 0u; i < iterations.x; i += 1u) {
    sum0_0 = subgroupMatrixMultiplyAccumulate(left0_0, right0, sum0_0);
    sum0_1 = subgroupMatrixMultiplyAccumulate(left0_0, right1, sum0_1);
    sum0_2 = subgroupMatrixMultiplyAccumulate(left0_0, right2, sum0_2);
    sum0_3 = subgroupMatrixMultiplyAccumulate(left0_0, right3, sum0_3);
    sum1_0 = subgroupMatrixMultiplyAccumulate(left1_0, right0, sum1_0);
    sum1_1 = subgroupMatrixMultiplyAccumulate(left1_0, right1, sum1_1);
    sum1_2 = subgroupMatrixMultiplyAccumulate(left1_0, right2, sum1_2);
    sum1_3 = subgroupMatrixMultiplyAccumulate(left1_0, right3, sum1_3);
    sum0_0 = subgroupMatrixMultiplyAccumulate(left0_0, right0, sum0_0);
    sum0_1 = subgroupMatrixMultiplyAccumulate(left0_0, right1, sum0_1);
    sum0_2 = subgroupMatrixMultiplyAccumulate(left0_0, right2, sum0_2);
    sum0_3 = subgroupMatrixMultiplyAccumulate(left0_0, right3, sum0_3);
    sum1_0 = subgroupMatrixMultiplyAccumulate(left1_0, right0, sum1_0);
    sum1_1 = subgroupMatrixMultiplyAccumulate(left1_0, right1, sum1_1);
    sum1_2 = subgroupMatrixMultiplyAccumulate(left1_0, right2, sum1_2);
    sum1_3 = subgroupMatrixMultiplyAccumulate(left1_0, right3, sum1_3);
    sum0_0 = subgroupMatrixMultiplyAccumulate(left0_0, right0, sum0_0);
    sum0_1 = subgroupMatrixMultiplyAccumulate(left0_0, right1, sum0_1);
    sum0_2 = subgroupMatrixMultiplyAccumulate(left0_0, right2, sum0_2);
    sum0_3 = subgroupMatrixMultiplyAccumulate(left0_0, right3, sum0_3);
    sum1_0 = subgroupMatrixMultiplyAccumulate(left1_0, right0, sum1_0);
    sum1_1 = subgroupMatrixMultiplyAccumulate(left1_0, right1, sum1_1);
    sum1_2 = subgroupMatrixMultiplyAccumulate(left1_0, right2, sum1_2);
    sum1_3 = subgroupMatrixMultiplyAccumulate(left1_0, right3, sum1_3);
    sum0_0 = subgroupMatrixMultiplyAccumulate(left0_0, right0, sum0_0);
    sum0_1 = subgroupMatrixMultiplyAccumulate(left0_0, right1, sum0_1);
    sum0_2 = subgroupMatrixMultiplyAccumulate(left0_0, right2, sum0_2);
    sum0_3 = subgroupMatrixMultiplyAccumulate(left0_0, right3, sum0_3);
    sum1_0 = subgroupMatrixMultiplyAccumulate(left1_0, right0, sum1_0);
    sum1_1 = subgroupMatrixMultiplyAccumulate(left1_0, right1, sum1_1);
    sum1_2 = subgroupMatrixMultiplyAccumulate(left1_0, right2, sum1_2);
    sum1_3 = subgroupMatrixMultiplyAccumulate(left1_0, right3, sum1_3);
  }
  var total = vec4<f32>();
  subgroupMatrixStore(&product, (subgroup * 64u) * 4u, sum0_0, false, 16u);
  workgroupBarrier();
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane) + 0u], product[4u * (subgroup * 64u + 2u * lane) + 1u], product[4u * (subgroup * 64u + 2u * lane) + 2u], product[4u * (subgroup * 64u + 2u * lane) + 3u]);
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane + 1u) + 0u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 1u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 2u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 3u]);
  workgroupBarrier();
  subgroupMatrixStore(&product, (subgroup * 64u) * 4u, sum0_1, false, 16u);
  workgroupBarrier();
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane) + 0u], product[4u * (subgroup * 64u + 2u * lane) + 1u], product[4u * (subgroup * 64u + 2u * lane) + 2u], product[4u * (subgroup * 64u + 2u * lane) + 3u]);
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane + 1u) + 0u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 1u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 2u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 3u]);
  workgroupBarrier();
  subgroupMatrixStore(&product, (subgroup * 64u) * 4u, sum0_2, false, 16u);
  workgroupBarrier();
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane) + 0u], product[4u * (subgroup * 64u + 2u * lane) + 1u], product[4u * (subgroup * 64u + 2u * lane) + 2u], product[4u * (subgroup * 64u + 2u * lane) + 3u]);
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane + 1u) + 0u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 1u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 2u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 3u]);
  workgroupBarrier();
  subgroupMatrixStore(&product, (subgroup * 64u) * 4u, sum0_3, false, 16u);
  workgroupBarrier();
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane) + 0u], product[4u * (subgroup * 64u + 2u * lane) + 1u], product[4u * (subgroup * 64u + 2u * lane) + 2u], product[4u * (subgroup * 64u + 2u * lane) + 3u]);
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane + 1u) + 0u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 1u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 2u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 3u]);
  workgroupBarrier();
  subgroupMatrixStore(&product, (subgroup * 64u) * 4u, sum1_0, false, 16u);
  workgroupBarrier();
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane) + 0u], product[4u * (subgroup * 64u + 2u * lane) + 1u], product[4u * (subgroup * 64u + 2u * lane) + 2u], product[4u * (subgroup * 64u + 2u * lane) + 3u]);
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane + 1u) + 0u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 1u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 2u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 3u]);
  workgroupBarrier();
  subgroupMatrixStore(&product, (subgroup * 64u) * 4u, sum1_1, false, 16u);
  workgroupBarrier();
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane) + 0u], product[4u * (subgroup * 64u + 2u * lane) + 1u], product[4u * (subgroup * 64u + 2u * lane) + 2u], product[4u * (subgroup * 64u + 2u * lane) + 3u]);
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane + 1u) + 0u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 1u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 2u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 3u]);
  workgroupBarrier();
  subgroupMatrixStore(&product, (subgroup * 64u) * 4u, sum1_2, false, 16u);
  workgroupBarrier();
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane) + 0u], product[4u * (subgroup * 64u + 2u * lane) + 1u], product[4u * (subgroup * 64u + 2u * lane) + 2u], product[4u * (subgroup * 64u + 2u * lane) + 3u]);
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane + 1u) + 0u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 1u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 2u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 3u]);
  workgroupBarrier();
  subgroupMatrixStore(&product, (subgroup * 64u) * 4u, sum1_3, false, 16u);
  workgroupBarrier();
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane) + 0u], product[4u * (subgroup * 64u + 2u * lane) + 1u], product[4u * (subgroup * 64u + 2u * lane) + 2u], product[4u * (subgroup * 64u + 2u * lane) + 3u]);
  total += vec4<f32>(product[4u * (subgroup * 64u + 2u * lane + 1u) + 0u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 1u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 2u], product[4u * (subgroup * 64u + 2u * lane + 1u) + 3u]);
  workgroupBarrier();
  sink[id.x] = total;
}
