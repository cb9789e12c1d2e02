// The pipeline's own kernels: a norm, and a matrix product that is all three projections of a layer.

/** Rows of `x` times `gain`, scaled to a root mean square of 1. One workgroup of 64 to a row. */
const rmsNorm = `
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> gain: array<f32>;
@group(0) @binding(2) var<storage, read_write> result: array<f32>;
override width: u32;
var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let start = group.x * width;
  var squares = 0.0;
  for (var i = lane; i < width; i += 64u) { squares += x[start + i] * x[start + i]; }
  partial[lane] = squares;
  for (var half = 32u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (lane < half) { partial[lane] += partial[lane + half]; }
  }
  workgroupBarrier();
  let factor = inverseSqrt(partial[0] / f32(width) + 1e-6);
  for (var i = lane; i < width; i += 64u) { result[start + i] = x[start + i] * factor * gain[i]; }
}`;

/** `x · weight`. One workgroup to 32 columns of a row; the inner axis is shared among 8, since decoding has one row. */
const multiply = `
@group(0) @binding(0) var<storage, read> x: array<f32>;       // [rows, inner]
@group(0) @binding(1) var<storage, read> weight: array<f32>;  // [inner, columns]
@group(0) @binding(2) var<storage, read_write> result: array<f32>;
@group(0) @binding(3) var<uniform> position: u32;             // tokens before this step
override inner: u32;
override columns: u32;
override append: bool = false;  // to a cache: the first row of the result is that of the position
override add: bool = false;     // to a residual stream: to what the result holds already
var<workgroup> partial: array<array<f32, 32>, 8>;

@compute @workgroup_size(32, 8)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
  let row = group.y;
  let column = group.x * 32u + local.x;
  var sum = 0.0;
  if (column < columns) {
    for (var k = local.y; k < inner; k += 8u) { sum += x[row * inner + k] * weight[k * columns + column]; }
  }
  partial[local.y][local.x] = sum;
  workgroupBarrier();
  if (local.y > 0u || column >= columns) { return; }
  for (var i = 1u; i < 8u; i++) { sum += partial[i][local.x]; }
  let at = (row + select(0u, position, append)) * columns + column;
  if (add) { result[at] += sum; } else { result[at] = sum; }
}`;

/** One kernel bound to its buffers. */
export interface BoundKernel {
  /** Records it for a step of so many rows. */
  encode(pass: GPUComputePassEncoder, rows: number): void;
}

/** The buffers of a kernel. */
export interface Operands {
  readonly x: GPUBuffer;
  /** The norm's gain, or the product's weight. */
  readonly weight: GPUBuffer;
  readonly result: GPUBuffer;
}

/** What a product does. */
export interface ProductOptions {
  /** The weight's rows. */
  readonly inner: number;
  /** The weight's columns. */
  readonly columns: number;
  /** Whether the result is a cache, to which the step's rows are appended. */
  readonly append?: boolean;
  /** Whether the result is a residual stream, to which the step's rows are added. */
  readonly add?: boolean;
}

/** The kernels of one device. */
export interface PipelineKernels {
  norm(width: number, operands: Operands): BoundKernel;
  product(options: ProductOptions, operands: Operands): BoundKernel;
}

/** Compiles the kernels for one device. `position` is a uniform buffer of one u32: the tokens before a step. */
export function pipelineKernels(device: GPUDevice, position: GPUBuffer): PipelineKernels {
  const modules = [rmsNorm, multiply].map((code) => device.createShaderModule({ code }));
  const pipelines = new Map<string, GPUComputePipeline>();
  const bind = (
    module: GPUShaderModule,
    constants: Record<string, number>,
    buffers: readonly GPUBuffer[],
    workgroups: (rows: number) => [x: number, y?: number],
  ): BoundKernel => {
    const key = JSON.stringify([modules.indexOf(module), constants]);
    const pipeline = pipelines.get(key) ??
      device.createComputePipeline({ layout: "auto", compute: { module, constants } });
    pipelines.set(key, pipeline);
    const bindGroup = device.createBindGroup({
      layout: pipeline.getBindGroupLayout(0),
      entries: buffers.map((buffer, binding) => ({ binding, resource: { buffer } })),
    });
    return {
      encode(pass, rows) {
        pass.setPipeline(pipeline);
        pass.setBindGroup(0, bindGroup);
        pass.dispatchWorkgroups(...workgroups(rows));
      },
    };
  };
  const [normModule, productModule] = modules;
  return {
    norm: (width, { x, weight, result }) => bind(normModule, { width }, [x, weight, result], (rows) => [rows]),
    product: ({ inner, columns, append = false, add = false }, { x, weight, result }) =>
      bind(
        productModule,
        { inner, columns, append: Number(append), add: Number(add) },
        [x, weight, result, position],
        (rows) => [Math.ceil(columns / 32), rows],
      ),
  };
}
