/** The output of {@link swiglu}, and the way back to both inputs. */
export interface Gated {
  readonly output: Float32Array;
  /** From ∂output to the gradients of gate and up. */
  backward(gradOutput: Float32Array): readonly [gradGate: Float32Array, gradUp: Float32Array];
}

/** `silu(gate) · up`, element by element; `silu(x) = x / (1 + exp(−x))`. */
export function swiglu(gate: Float32Array, up: Float32Array): Gated {
  const output = new Float32Array(gate.length);
  for (let i = 0; i < gate.length; i++) output[i] = gate[i] * sigmoid(gate[i]) * up[i];
  return {
    output,
    backward(gradOutput) {
      const [gradGate, gradUp] = [new Float32Array(gate.length), new Float32Array(gate.length)];
      for (let i = 0; i < gate.length; i++) {
        const s = sigmoid(gate[i]);
        gradUp[i] = gradOutput[i] * gate[i] * s;
        gradGate[i] = gradOutput[i] * up[i] * s * (1 + gate[i] * (1 - s));
      }
      return [gradGate, gradUp];
    },
  };
}

function sigmoid(x: number): number {
  return 1 / (1 + Math.exp(-x));
}
