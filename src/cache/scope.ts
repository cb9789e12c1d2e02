// Dynamic scoping: a value that holds for the calls made inside a block, however deep, without passing it along.
//
// Where the runtime has AsyncLocalStorage (Deno, Bun, Node) every asynchronous call carries its own chain of scopes.
// Browsers have none: there the open scopes form one stack for the whole page.
//
//                       | with AsyncLocalStorage                          | without
//   run(value, fn)      | exact: only what fn starts, also when calls     | everything that runs until fn's promise
//                       | overlap                                         | has settled
//   using = enter(value)| the rest of the block and what it starts, and,  | everything that runs until the block
//                       | until the block ends, the caller too when the   | ends
//                       | block's function had not awaited yet (enterWith |
//                       | changes the context that the caller shares)     |
//
// In every case the innermost scope is looked at first, and a scope that has ended is invisible, also to stray work
// that it started: each entry has a flag that its end clears, and readers pass over cleared ones.

interface Entry<T> {
  readonly value: T;
  outer: Entry<T> | undefined;
  active: boolean;
}

/** Keeps the chain of open scopes of the code that is running now. */
interface Chain<T> {
  innermost(): Entry<T> | undefined;
  enter(entry: Entry<T>): void;
  leave(entry: Entry<T>): void;
  run<R>(entry: Entry<T>, fn: () => R): R;
}

/** A value that holds inside a block or a callback. The table at the top of the file says what each form promises. */
export class Scope<T> {
  readonly #chain: Chain<T>;

  /**
   * Makes a scope without any value yet.
   *
   * @param asynchronous False keeps one stack even where the runtime could tell asynchronous calls apart.
   */
  constructor(asynchronous: boolean = true) {
    this.#chain = (asynchronous ? asyncChain<T>() : undefined) ?? stackChain<T>();
  }

  /**
   * Opens a scope until the handle is disposed, for `using handle = scope.enter(value)`.
   *
   * @param value The value that holds.
   * @returns The handle. Disposing it twice, or in another order than scopes were opened, is harmless.
   */
  enter(value: T): Disposable {
    const entry = this.#entry(value);
    this.#chain.enter(entry);
    return { [Symbol.dispose]: () => this.#end(entry) };
  }

  /**
   * Runs a function inside a scope, which ends when the function returns, or when the promise that it returns settles.
   *
   * @param value The value that holds.
   * @param fn What to run.
   * @returns What `fn` returns.
   */
  run<R>(value: T, fn: () => R): R {
    const entry = this.#entry(value);
    return this.#chain.run(entry, () => endingWith(fn, () => this.#end(entry)));
  }

  /**
   * Asks the open scopes, innermost first.
   *
   * @param pick Returns what is wanted of a value, or undefined to ask the next scope outwards.
   * @returns The first answer, or undefined.
   */
  find<R>(pick: (value: T) => R | undefined): R | undefined {
    for (let entry = firstActive(this.#chain.innermost()); entry; entry = outerOf(entry)) {
      const picked = pick(entry.value);
      if (picked !== undefined) return picked;
    }
    return undefined;
  }

  /** The values that hold here, innermost first: for calls that must remember what held when they were made. */
  values(): T[] {
    const values: T[] = [];
    this.find((value) => {
      values.push(value);
      return undefined;
    });
    return values;
  }

  #entry(value: T): Entry<T> {
    const outer = firstActive(this.#chain.innermost());
    // Walks outwards once, so that ended scopes are let go of even where calls never cease to overlap.
    for (let entry = outer; entry; entry = outerOf(entry));
    return { value, outer, active: true };
  }

  #end(entry: Entry<T>): void {
    if (!entry.active) return;
    entry.active = false;
    this.#chain.leave(entry);
  }
}

function firstActive<T>(entry: Entry<T> | undefined): Entry<T> | undefined {
  while (entry !== undefined && !entry.active) entry = entry.outer;
  return entry;
}

function outerOf<T>(entry: Entry<T>): Entry<T> | undefined {
  return entry.outer = firstActive(entry.outer);
}

/** Runs `fn`, then `end`: at once, or when the promise that `fn` returned settles. */
function endingWith<R>(fn: () => R, end: () => void): R {
  let pending = false;
  try {
    const result = fn();
    if (typeof (result as PromiseLike<unknown> | null)?.then === "function") {
      pending = true;
      return Promise.resolve(result).finally(end) as R;
    }
    return result;
  } finally {
    if (!pending) end();
  }
}

interface AsyncStorage<T> {
  getStore(): T | undefined;
  enterWith(store: T | undefined): void;
  run<R>(store: T, fn: () => R): R;
}

interface ProcessLike {
  getBuiltinModule?(name: string): { AsyncLocalStorage?: new <T>() => AsyncStorage<T> } | undefined;
}

/** Scopes that follow asynchronous calls; undefined where the runtime has no AsyncLocalStorage. */
function asyncChain<T>(): Chain<T> | undefined {
  // Not an import: browsers load this module as well, and have no node: modules to resolve.
  const { process } = globalThis as { process?: ProcessLike };
  const AsyncLocalStorage = process?.getBuiltinModule?.("node:async_hooks")?.AsyncLocalStorage;
  if (AsyncLocalStorage === undefined) return undefined;
  const storage = new AsyncLocalStorage<Entry<T>>();
  return {
    innermost: () => storage.getStore(),
    enter: (entry) => storage.enterWith(entry),
    leave: (entry) => {
      // Elsewhere the cleared flag is enough: another context's chain is not ours to change.
      if (storage.getStore() === entry) storage.enterWith(firstActive(entry.outer));
    },
    run: (entry, fn) => storage.run(entry, fn),
  };
}

/** One stack for everything. Ended scopes are passed over wherever they lie: overlapping calls do not end in order. */
function stackChain<T>(): Chain<T> {
  let top: Entry<T> | undefined;
  return {
    innermost: () => top,
    enter: (entry) => top = entry,
    leave: () => top = firstActive(top),
    run: (entry, fn) => {
      top = entry;
      return fn();
    },
  };
}
