// What ran where: the reports of all rows held against each other, so that no test is left out unnoticed.

import { joint, type Outcome } from "./junit.ts";

/** What one row reported. */
export interface RowReport {
  readonly outcomes: readonly Outcome[];
  /** Whether groups that are skipped, and the tests in them, are missing from the report. */
  readonly hidesSkippedGroups: boolean;
}

/** One row counted, in tests; a group is none. */
export interface RowCount {
  passed: number;
  failed: number;
  /** Tests that the row says it skipped, alone or with a group around them, and that another row may have run. */
  skipped: number;
  /** The names of those that failed. */
  readonly failures: string[];
  /** Tests that another row has and that this one neither ran nor skipped. */
  readonly lost: string[];
}

/** What all rows know together. */
interface Known {
  readonly groups: ReadonlySet<string>;
  /** How many tests have a name, at most: two files may use the same one. */
  readonly tests: ReadonlyMap<string, number>;
  /** The tests that some row ran. */
  readonly ran: ReadonlySet<string>;
}

/** Counts the tests of each row. */
export function countRows(reports: readonly RowReport[]): RowCount[] {
  const all = reports.flatMap(({ outcomes }) => outcomes);
  // Deno alone reports groups as it reports tests. What has something in it in any report is a group.
  const groups = new Set(all.flatMap(({ name }) => groupsAround(name)));
  const tests = new Map<string, number>();
  for (const { outcomes } of reports) {
    for (const [name, count] of tally(outcomes, groups)) tests.set(name, Math.max(tests.get(name) ?? 0, count));
  }
  const ran = new Set(all.filter(({ state }) => state !== "skipped").map(({ name }) => name));
  return reports.map((report) => countRow(report, { groups, tests, ran }));
}

function countRow({ outcomes, hidesSkippedGroups }: RowReport, known: Known): RowCount {
  const count: RowCount = { passed: 0, failed: 0, skipped: 0, failures: [], lost: [] };
  const failedInside = new Set<string>();
  for (const { name, state } of outcomes.filter(({ name }) => !known.groups.has(name))) {
    if (isFile(name) && state !== "failed") continue;
    count[state]++;
    if (state !== "failed") continue;
    count.failures.push(name);
    for (const group of groupsAround(name)) failedInside.add(group);
  }
  // A group can fail by itself, in its hooks.
  for (const { name, state } of outcomes) {
    if (state !== "failed" || !known.groups.has(name) || failedInside.has(name)) continue;
    count.failed++;
    count.failures.push(name);
  }

  const skipped = new Set(outcomes.filter(({ state }) => state === "skipped").map(({ name }) => name));
  const reported = new Set(outcomes.flatMap(({ name }) => groupsAround(name)));
  const own = tally(outcomes, known.groups);
  for (const [name, expected] of known.tests) {
    const missing = expected - (own.get(name) ?? 0);
    if (missing <= 0) continue;
    const around = groupsAround(name);
    const hidden = hidesSkippedGroups && outcomes.length > 0 &&
      (around.some((group) => !reported.has(group)) || !known.ran.has(name));
    if (hidden || around.some((group) => skipped.has(group))) count.skipped += missing;
    else count.lost.push(name);
  }
  return count;
}

/** How often each test's name occurs. */
function tally(outcomes: readonly Outcome[], groups: ReadonlySet<string>): Map<string, number> {
  const counts = new Map<string, number>();
  for (const { name } of outcomes) {
    if (!groups.has(name) && !isFile(name)) counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return counts;
}

/** Whether a name is a file's: so Node reports one that crashed, or that has no test. */
function isFile(name: string): boolean {
  return /^([A-Za-z]:)?[\\/].*\.[jt]s$/.test(name);
}

/** The names of the groups around a test, outermost first. */
function groupsAround(name: string): string[] {
  const parts = name.split(joint);
  return parts.slice(1).map((_, i) => parts.slice(0, i + 1).join(joint));
}

/** Lines of text with columns of equal width; all but the first and the last columns are numbers. */
export function table(lines: readonly (readonly string[])[]): string {
  const widths = lines[0].map((_, column) => Math.max(...lines.map((line) => line[column].length)));
  const cell = (text: string, column: number) =>
    /^[\d.–]*$/.test(text) ? text.padStart(widths[column]) : text.padEnd(widths[column]);
  return lines.map((line) => line.map(cell).join("  ").trimEnd()).join("\n");
}
