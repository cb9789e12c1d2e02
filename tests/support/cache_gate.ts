/** A promise that a test resolves when it sees fit. */
export interface Gate {
  readonly promise: Promise<void>;
  resolve(): void;
}

/** What Promise.withResolvers() makes, which Node 20 has not. */
export function closedGate(): Gate {
  let resolve!: () => void;
  const promise = new Promise<void>((settle) => resolve = settle);
  return { promise, resolve };
}
