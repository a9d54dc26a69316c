// What the server's /api speaks of; the areas add what only they use.

export interface Me {
  name: string;
  account: string;
  admin: boolean;
  /** No keys have been made: whoever is on this machine may do everything. */
  open: boolean;
  currency: string;
  balance: string | null;
  version: string;
}

export interface Model {
  id: string;
  aliases: string[];
  source: string;
  thinks: boolean;
  tools: boolean;
  context: number;
  parameters: number;
  price: { hit: string; miss: string; output: string; currency: string } | null;
  examples: string[];
  /** A "text" model has no chat template: it goes on with an opening. */
  kind: "chat" | "text";
}
