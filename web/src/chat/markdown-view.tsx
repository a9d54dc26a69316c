// Shows a text that grows. Finished blocks are parsed once and their nodes never touched again; of
// the block still growing only what differs is changed, so a selection, a scrolled code box and the
// reader's eye stay where they are.
import { useLayoutEffect, useMemo, useRef } from "preact/hooks";
import { language } from "../i18n";
import { blocks, safe } from "./markdown";

function Piece({ html }: { html: string }) {
  const box = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => settle(box.current!, safe(html)), [html]);
  return <div ref={box} class="piece" />;
}

/** Makes `old`'s children like those of `wanted`, keeping nodes that are alike. */
function settle(old: Node, wanted: Node): void {
  let mine = old.firstChild;
  let next: ChildNode | null;
  for (let theirs = wanted.firstChild; theirs; theirs = next) {
    next = theirs.nextSibling;
    if (!mine) {
      old.appendChild(theirs);
      continue;
    }
    const after: ChildNode | null = mine.nextSibling;
    if (mine.nodeType === Node.TEXT_NODE && theirs.nodeType === Node.TEXT_NODE) {
      if (mine.nodeValue !== theirs.nodeValue) mine.nodeValue = theirs.nodeValue;
    } else if (alike(mine, theirs)) settle(mine, theirs);
    else old.replaceChild(theirs, mine);
    mine = after;
  }
  while (mine) {
    const after: ChildNode | null = mine.nextSibling;
    mine.remove();
    mine = after;
  }
}

function alike(one: Node, other: Node): boolean {
  if (!(one instanceof Element) || !(other instanceof Element)) return false;
  if (one.tagName !== other.tagName || one.attributes.length !== other.attributes.length) return false;
  return [...one.attributes].every((each) => other.getAttribute(each.name) === each.value);
}

interface Parsed {
  text: string;
  done: string[]; // HTML of finished blocks
  until: number; // how much of the text they are
}

/** Goes on from what was parsed of the same text before. */
function advance(before: Parsed | null, text: string, growing: boolean): [Parsed, string[]] {
  const same = before !== null && growing && text.startsWith(before.text.slice(0, before.until));
  const from = same ? before : { text, done: [], until: 0 };
  const rest = blocks(text.slice(from.until), growing);
  if (!growing) return [{ text, done: [], until: 0 }, [...from.done, ...rest.map((one) => one.html)]];
  const finished = rest.slice(0, -1);
  const until = from.until + (finished.at(-1)?.end ?? 0);
  const done = finished.length ? [...from.done, ...finished.map((one) => one.html)] : from.done;
  return [{ text, done, until }, [...done, ...rest.slice(-1).map((one) => one.html)]];
}

export function Markdown({ text, growing = false }: { text: string; growing?: boolean }) {
  const parsed = useRef<{ of: string; was: Parsed } | null>(null);
  const tongue = language.value; // the copy buttons' words stand in the HTML
  const htmls = useMemo(() => {
    const before = parsed.current?.of === tongue ? parsed.current.was : null;
    const [was, all] = advance(before, text, growing);
    parsed.current = { of: tongue, was };
    return all;
  }, [text, growing, tongue]);
  return (
    <div class="markdown">
      {htmls.map((html, at) => (
        <Piece key={at} html={html} />
      ))}
    </div>
  );
}
