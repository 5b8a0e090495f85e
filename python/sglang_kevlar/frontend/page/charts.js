// Latencies by the second, on a logarithmic scale; failovers are upright lines.

import { byId, ms, svg } from "./dom.js";

const HEIGHT = 150;
const LEFT = 52;
const BOTTOM = 8;

// `lines`: [class, name, column of a row of /kevlar/history]
export function drawChart(id, server, seconds, lines) {
  const figure = byId(id);
  const width = Math.max(200, figure.clientWidth);
  const end = server.now();
  const begin = end - seconds * 1000;
  const rows = [...server.seconds.values()].filter((row) => server.wall(row[0]) >= begin);
  const values = rows.flatMap((row) => lines.map((line) => row[line[2]])).filter((value) => value !== null);
  const low = Math.log10(Math.max(0.1, Math.min(10, ...values)));
  const high = Math.log10(Math.max(100, ...values)) + 0.1;
  const x = (wall) => LEFT + ((width - LEFT - 4) * (wall - begin)) / (end - begin);
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - 4) * (Math.log10(Math.max(0.1, value)) - low)) / (high - low);
  const parts = [];
  for (let power = Math.ceil(low); power <= high; power++) {
    const at = y(10 ** power);
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: width, y1: at, y2: at }));
    parts.push(svg("text", { class: "scale", x: LEFT - 6, y: at + 4 }, ms(10 ** power).replace(".0", "")));
  }
  for (const failover of server.status.failovers) {
    const at = Date.parse(failover.at);
    if (at >= begin) parts.push(svg("line", { class: "failover", x1: x(at), x2: x(at), y1: 0, y2: HEIGHT - BOTTOM }));
  }
  for (const [kind, , column] of lines) {
    for (const path of pieces(rows, column)) {
      const points = path.map((row) => `${x(server.wall(row[0] + 0.5)).toFixed(1)},${y(row[column]).toFixed(1)}`);
      // A second alone would be a line of no length.
      if (points.length === 1) parts.push(svg("circle", { class: kind, r: 1.5, cx: points[0].split(",")[0], cy: points[0].split(",")[1] }));
      else parts.push(svg("polyline", { class: kind, points: points.join(" ") }));
    }
  }
  const last = rows.at(-1);
  const said = lines.map((line) => `${line[1]} ${last ? ms(last[line[2]]) : "–"}`).join(", ");
  const drawing = svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `latest second: ${said}` }, ...parts);
  const caption = document.createElement("figcaption");
  for (const [kind, name] of lines) {
    const sample = document.createElement("span");
    sample.className = `key ${kind}`;
    sample.textContent = name;
    caption.append(sample);
  }
  figure.replaceChildren(drawing, caption);
}

// Seconds with no value in between are a gap in the line, not a line over it.
function pieces(rows, column) {
  const found = [];
  let before = null;
  for (const row of rows) {
    if (row[column] === null) continue;
    if (before === null || row[0] > before + 2) found.push([]);
    found.at(-1).push(row);
    before = row[0];
  }
  return found;
}
