// Text files, read in the browser: they become part of the question and go nowhere else.
import type { Attachment } from "./types";
import { chatWords as t } from "./words";

const MOST = 256 * 1024; // bytes of one file: more than most contexts hold

/** Reads them; what cannot be taken is said, and the others are taken. */
export async function readFiles(files: Iterable<File>): Promise<{ taken: Attachment[]; refused: string[] }> {
  const taken: Attachment[] = [];
  const refused: string[] = [];
  for (const file of files) {
    if (file.size > MOST) {
      refused.push(t("tooLarge", { name: file.name, most: MOST / 1024 }));
      continue;
    }
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      if (text.includes("\0")) throw new Error("binary");
      taken.push({ name: file.name, text });
    } catch {
      refused.push(t("notText", { name: file.name }));
    }
  }
  return { taken, refused };
}
