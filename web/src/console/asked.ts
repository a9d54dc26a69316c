// What a section shows, asked of the server when it appears and again when something was changed.

import { useEffect, useState } from "preact/hooks";
import { get } from "../shell/api";

export interface Asked<T> {
  value: T | null;
  fault: unknown;
  again: () => void;
}

/** The answer to a GET. While it is asked again, what was known stays. */
export function useAsked<T>(path: string): Asked<T> {
  const [value, setValue] = useState<T | null>(null);
  const [fault, setFault] = useState<unknown>(null);
  const [count, setCount] = useState(0);
  useEffect(() => {
    const over = new AbortController();
    get<T>(path, over.signal).then(
      (answer) => {
        setValue(answer);
        setFault(null);
      },
      (reason) => over.signal.aborted || setFault(reason),
    );
    return () => over.abort();
  }, [path, count]);
  return { value, fault, again: () => setCount((before) => before + 1) };
}
