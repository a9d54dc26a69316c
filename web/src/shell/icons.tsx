// Line icons on a grid of 24, drawn for this page. They are ornaments: the button names itself.
const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  search: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14ZM16.2 16.2 21 21",
  close: "M6 6l12 12M18 6 6 18",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8Z",
  copy: "M9 9h10v11H9ZM15 9V4H5v11h4",
  check: "M5 12.5l4.5 4.5L19 7",
  edit: "M4 20h4L19 9l-4-4L4 16ZM13 7l4 4",
  retry: "M20 12a8 8 0 1 1-2.6-5.9M20 4v4.5h-4.5",
  left: "M14.5 6 8.5 12l6 6",
  right: "M9.5 6l6 6-6 6",
  down: "M6 9.5l6 6 6-6",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  upload: "M12 16V4M7 8l5-4 5 4M5 20h14",
  attach: "M19 11.5 11.8 18.7a4.2 4.2 0 0 1-6-6L13 5.5a2.8 2.8 0 0 1 4 4L9.8 16.7a1.4 1.4 0 0 1-2-2L14 8.5",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.8v4.4M9 14.8v4.4",
  thought: "M12 3v3M12 18v3M3 12h3M18 12h3M5.6 5.6l2.2 2.2M16.2 16.2l2.2 2.2M5.6 18.4l2.2-2.2M16.2 7.8l2.2-2.2",
  skip: "M5 6l7 6-7 6ZM13 6l7 6-7 6Z",
  tool: "M14.5 6.5a4 4 0 0 0 5 5L11 20a2.1 2.1 0 0 1-3-3l8.5-8.5M14.5 6.5 17 4a4 4 0 0 1 3 3l-2.5 2.5",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8ZM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6 19 19M5 19l1.4-1.4M17.6 6.4 19 5",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5Z",
  system: "M4 5h16v11H4ZM9 20h6M12 16v4",
  warning: "M12 4 2.8 20h18.4ZM12 10v5M12 17.5h.01",
  chat: "M4 5h16v11H10l-5 4v-4H4Z",
  chart: "M4 4v16h16M7.5 15l4-4.5 3 2.5L20 7",
  gauge: "M4 18a9 9 0 1 1 16 0M12 14l4-5",
  play: "M8 5.5v13l11-6.5Z",
  external: "M14 4h6v6M20 4l-9 9M18 14v6H4V6h6",
  keyboard: "M3 7h18v10H3ZM7 11h.01M11 11h.01M15 11h.01M17 11h.01M8 14h8",
  key: "M8 11a4 4 0 1 0 0 8 4 4 0 0 0 0-8ZM11 12l8-8M16 7l3 3",
  file: "M6 3h8l4 4v14H6ZM14 3v4h4",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name, size = 18 }: { name: IconName; size?: number }) {
  return (
    <svg class="icon" width={size} height={size} viewBox="0 0 24 24" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}

/** The page's own mark, as in mark.svg; in the page it needs no request. */
export function Mark({ size }: { size: number }) {
  return (
    <svg class="mark" width={size} height={size} viewBox="0 0 32 32" aria-hidden="true">
      <rect width="32" height="32" rx="8" fill="#3f5bd8" />
      <g fill="none" stroke="#fff" stroke-width="3" stroke-linecap="round">
        <path d="M16 7.5a8.2 8.2 0 1 0 5.1 14.6" />
        <path d="M16 7.5a8.2 8.2 0 0 1 7.2 12.2" stroke="#b9c6ff" />
        <path d="m18 18 6.5 6.5" />
      </g>
    </svg>
  );
}
