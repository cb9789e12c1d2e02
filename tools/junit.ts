// Test reports as JUnit's XML, which the runners of Deno, Bun and Node all write, each in its own dialect.

/** One test of a report, or a group of tests where the runner reports groups as such. */
export interface Outcome {
  /** Its name after those of the groups around it, joined by " > ". */
  readonly name: string;
  readonly state: "passed" | "failed" | "skipped";
}

/** What joins the names of groups and tests. */
export const joint = " > ";

/**
 * Reads a report.
 *
 * @param xml The report.
 * @param options Whether the outermost suites are files (Deno, Bun) and not groups (Node).
 */
export function readJUnit(xml: string, options: { readonly filesAreSuites: boolean }): Outcome[] {
  const outcomes: Outcome[] = [];
  const suites: string[] = [];
  let open: { name: string; state: Outcome["state"] } | null = null;
  // Text is escaped and so has no "<", but Node leaves ">" in attributes as it is.
  for (const [, close, tag, attributes, empty] of xml.matchAll(/<(\/?)(\w+)((?:\s+[\w:]+="[^"]*")*)\s*(\/?)>/g)) {
    const name = unescaped(attributes.match(/\sname="([^"]*)"/)?.[1] ?? "");
    if (tag === "testsuite") {
      if (close) suites.pop();
      else if (!empty) suites.push(name);
    } else if (tag === "testcase" && !close) {
      const groups = options.filesAreSuites ? suites.slice(1) : suites;
      open = { name: [...groups, name].join(joint), state: "passed" };
      outcomes.push(open);
    } else if (open !== null && !close && tag === "skipped") {
      open.state = "skipped";
    } else if (open !== null && !close && (tag === "failure" || tag === "error")) {
      open.state = "failed";
    }
  }
  return outcomes;
}

/** Text without its escapes; Node escapes quotes twice. */
function unescaped(text: string): string {
  const characters: Record<string, string> = { lt: "<", gt: ">", quot: '"', apos: "'", amp: "&" };
  const once = text.replace(/&(?:#(x?)([0-9a-fA-F]+)|(\w+));/g, (whole, hex, code, named) => {
    if (code !== undefined) return String.fromCodePoint(parseInt(code, hex ? 16 : 10));
    return characters[named] ?? whole;
  });
  return once.replaceAll("&quot;", '"');
}
