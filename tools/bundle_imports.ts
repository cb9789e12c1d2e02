/**
 * What a bundle still imports by name.
 *
 * @param code The bundle.
 * @returns Specifiers, such as `node:fs`.
 */
export function imports(code: string): string[] {
  const pattern = /\b(?:from|import)\s*\(?\s*["']([^"'$]+)["']/g; // no "$": an error message says from "${specifier}"
  return [...code.matchAll(pattern)].map(([, name]) => name);
}
