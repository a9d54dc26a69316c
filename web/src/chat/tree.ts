// A conversation's messages form a tree: editing a question or answering anew makes a sibling, and
// the branch in view is the way from the root to one leaf.
import type { Message } from "./types";

/** In the order in which they were made. */
export type Tree = ReadonlyMap<string, Message>;

/** From the first message to the leaf. */
export function branch(tree: Tree, leaf: string | null): Message[] {
  const path: Message[] = [];
  for (let at = leaf ? tree.get(leaf) : undefined; at; at = at.parent ? tree.get(at.parent) : undefined)
    path.unshift(at);
  return path;
}

/** The versions that a message is one of. */
export function siblings(tree: Tree, message: Message): Message[] {
  return [...tree.values()].filter((one) => one.parent === message.parent && one.role === message.role);
}

/** The newest leaf below a message, or itself. */
export function newestLeaf(tree: Tree, id: string): string {
  const children = [...tree.values()].filter((one) => one.parent === id);
  return children.length ? newestLeaf(tree, children.at(-1)!.id) : id;
}

/** The tree with a message added or changed; `was` is the id it had before it was saved. */
export function withMessage(tree: Tree, message: Message, was = message.id): Tree {
  if (was === message.id) return new Map(tree).set(message.id, message);
  // What hangs on it is not lost when it gets the server's id.
  return new Map(
    [...tree].map(([id, one]) => {
      if (id === was) return [message.id, message];
      return [id, one.parent === was ? { ...one, parent: message.id } : one];
    }),
  );
}
