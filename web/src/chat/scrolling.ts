// The page follows an answer that grows, until the reader scrolls up; at the foot it follows again.
import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";

const NEAR = 40; // pixels from the foot that count as at the foot

export function useFollowing(again: unknown) {
  const scroller = useRef<HTMLDivElement>(null);
  const content = useRef<HTMLDivElement>(null);
  const state = useRef({ follows: true, away: signal(false), top: 0 }).current;

  const toFoot = (smooth = false) => {
    const box = scroller.current;
    state.follows = true;
    state.away.value = false;
    box?.scrollTo({ top: box.scrollHeight, behavior: smooth ? "smooth" : "instant" });
  };

  useEffect(() => {
    const box = scroller.current!;
    const onScroll = () => {
      const near = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR;
      if (near) state.follows = true;
      else if (box.scrollTop < state.top - 2) state.follows = false;
      state.top = box.scrollTop;
      state.away.value = !near && !state.follows;
    };
    const grown = new ResizeObserver(() => {
      if (state.follows) box.scrollTop = box.scrollHeight;
    });
    grown.observe(content.current!);
    grown.observe(box);
    box.addEventListener("scroll", onScroll, { passive: true });
    return () => {
      grown.disconnect();
      box.removeEventListener("scroll", onScroll);
    };
  }, []);
  useEffect(() => toFoot(), [again]);
  return { scroller, content, away: state.away, toFoot };
}
