// How kernels read and write storage arrays: in float32 or half precision, four neighbours at a time where they are
// aligned. Arithmetic is float32 throughout.

/** WGSL's element type of a storage array. */
export type StorageElement = "f32" | "vec4<f32>" | "f16" | "vec4<f16>";

/** The element type for an operand, by its storage and whether every quad of it is aligned. */
export function storageElement(dtype: "f32" | "f16", quads: boolean): StorageElement {
  return quads ? `vec4<${dtype}>` : dtype;
}

/** The directives that kernels over such arrays begin with. */
export function storageDirectives(elements: readonly string[]): string {
  return elements.some((element) => element.includes("f16")) ? "enable f16;\n" : "";
}

/**
 * WGSL expression of type vec4<f32> that loads four neighbours along the last axis, or zeros for those at or past `width`.
 *
 * @param buffer The storage array's name.
 * @param element Its element type.
 * @param offset Index of column 0, counted in single elements.
 * @param column First of the four columns; a multiple of 4, below `width`.
 * @param width Number of columns.
 */
export function load4(
  buffer: string,
  element: StorageElement,
  offset: string,
  column: string,
  width: string,
): string {
  const quad = `${buffer}[(${offset} + ${column}) / 4u]`;
  if (element === "vec4<f32>") return quad;
  if (element === "vec4<f16>") return `vec4<f32>(${quad})`;
  const one = (i: number) => {
    const loaded = `${buffer}[${offset} + min(${column} + ${i}u, ${width} - 1u)]`;
    return `select(0.0, ${element === "f16" ? `f32(${loaded})` : loaded}, ${column} + ${i}u < ${width})`;
  };
  return `vec4<f32>(${[0, 1, 2, 3].map(one).join(", ")})`;
}

/** WGSL statements that store the vec4<f32> `value` at `column`, of which only columns below `width` exist. */
export function store4(
  buffer: string,
  element: StorageElement,
  offset: string,
  column: string,
  width: string,
  value: string,
): string {
  if (element === "vec4<f32>" || element === "vec4<f16>") {
    const stored = element === "vec4<f16>" ? `vec4<f16>(${value})` : value;
    return `if (${column} < ${width}) { ${buffer}[(${offset} + ${column}) / 4u] = ${stored}; }`;
  }
  return [0, 1, 2, 3].map((i) => {
    const stored = element === "f16" ? `f16(${value}[${i}])` : `${value}[${i}]`;
    return `if (${column} + ${i}u < ${width}) { ${buffer}[${offset} + ${column} + ${i}u] = ${stored}; }`;
  }).join("\n");
}
