// A conversation as the server keeps it: messages form a tree, a leaf names the branch in view.

export interface Settings {
  temperature: number | null;
  top_p: number | null;
  max_tokens: number | null;
  thinking: boolean;
  thinking_budget: number | null;
  seed: number | null;
  /** OpenAI's list of tools, as JSON text; "" for none. */
  tools: string;
}

/** null leaves it to the server. */
export const DEFAULTS: Settings = {
  temperature: null,
  top_p: null,
  max_tokens: null,
  thinking: true,
  thinking_budget: null,
  seed: null,
  tools: "",
};

export interface Summary {
  id: string;
  title: string;
  updated: number; // seconds since 1970
  model: string | null;
  snippet?: string | null;
}

export interface Attachment {
  name: string;
  text: string;
}

export interface ToolCall {
  id: string;
  name: string;
  arguments: string;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_cache_hit_tokens?: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
  completion_tokens_details?: { reasoning_tokens?: number } | null;
}

export interface Speed {
  seconds: number;
  ttft: number | null;
  tokens_per_second: number | null;
}

export type Role = "user" | "assistant" | "tool";

/** What is kept of a message. */
export interface Kept {
  parent: string | null;
  role: Role;
  content: string;
  reasoning_content?: string | null;
  reasoning_seconds?: number | null;
  model?: string | null;
  usage?: Usage | null;
  cost?: string | null;
  speed?: Speed | null;
  finish_reason?: string | null;
  attachments?: Attachment[] | null;
  tool_calls?: ToolCall[] | null;
  tool_call_id?: string | null;
}

export interface Message extends Kept {
  id: string;
}

export interface Conversation {
  id: string;
  title: string;
  model: string | null;
  system: string | null;
  settings: Partial<Settings> | null;
  leaf: string | null;
  updated: number; // seconds since 1970
  messages: Message[];
}
