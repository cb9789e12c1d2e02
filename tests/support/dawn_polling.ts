// Has Dawn poll less. While anything is under way, npm's `webgpu` looks with setImmediate() whether it is done: 27,000 times
// a second, each time with a new function, on a core that a software adapter's compiler could use. In Deno the functions
// are collected in a time that grows with the square of their number: one file's tests took 4 minutes more.

const host = globalThis as { setImmediate?: unknown };

if (host.setImmediate !== undefined) {
  host.setImmediate = (work: (...args: unknown[]) => void, ...args: unknown[]) => setTimeout(work, 1, ...args);
}
