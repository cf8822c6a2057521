"""The script of the page: draws the timelines at the width of the window, and shows a detail under the pointer."""

SCRIPT = """
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const longest = Math.max(...Object.values(data).map(t => t.makespan_us)) || 1;
  const SIZE = 7, LANE = 24, LINKS = 6, LABEL = 17, GAP = 8;
  const ms = us => (us / 1000).toLocaleString("en", {minimumFractionDigits: 3, maximumFractionDigits: 3});

  function detail(t, i) {
    const [rank, kind, stage, peer, microbatch, start, length] = t.e.slice(i * SIZE, i * SIZE + SIZE);
    const to = peer ? ` to stage ${peer - 1}` : "";
    return `${t.kinds[kind]}, stage ${stage}${to}, micro-batch ${microbatch}, rank ${rank}: ` +
      `${ms(start * t.unit_us)} to ${ms((start + length) * t.unit_us)} ms (${ms(length * t.unit_us)} ms)`;
  }

  function tick(us) {
    const unit = 10 ** Math.floor(Math.log10(us / 8));
    return [1, 2, 5, 10].map(m => m * unit).find(s => us / s <= 8);
  }

  function draw(box) {
    const t = data[box.dataset.timeline], width = Math.max(box.clientWidth, 280);
    const scale = (width - 2) / longest, row = LABEL + LANE + LINKS + GAP, out = [];
    t.bubble.forEach((bubble, rank) => {
      const y = rank * row;
      out.push(`<text x="0" y="${y + 12}">rank ${rank} <tspan class="soft">waits ${(100 * bubble).toFixed(0)}%</tspan></text>`,
        `<rect class="idle" x="0" y="${y + LABEL}" width="${(t.makespan_us * scale).toFixed(1)}" height="${LANE}"/>`);
    });
    const labels = [];
    for (let i = 0; i * SIZE < t.e.length; i++) {
      const [rank, kind, stage, peer, microbatch, start, length] = t.e.slice(i * SIZE, i * SIZE + SIZE);
      const x = start * t.unit_us * scale, w = Math.max(length * t.unit_us * scale - 0.4, 0.4), code = t.codes[kind];
      const y = rank * row + LABEL + (peer ? LANE + 1 : 0);
      out.push(`<rect class="${code} s${stage}" data-i="${i}" x="${x.toFixed(2)}" y="${y}" width="${w.toFixed(2)}" height="${peer ? LINKS : LANE}"/>`);
      if (!peer && w > 9 + 6 * String(microbatch).length)
        labels.push(`<text class="in in${code}" x="${(x + w / 2).toFixed(1)}" y="${y + 16}">${microbatch}</text>`);
    }
    const bottom = t.bubble.length * row, step = tick(longest);
    out.push(...labels, `<line class="axis" x1="0" x2="${width}" y1="${bottom}" y2="${bottom}"/>`);
    for (let us = 0; step && us <= longest * 0.97; us += step)
      out.push(`<line class="axis" x1="${us * scale}" x2="${us * scale}" y1="${bottom}" y2="${bottom + 4}"/>`,
        `<text class="soft" x="${us * scale + 2}" y="${bottom + 15}">${+(us / 1000).toPrecision(6)}${us ? "" : " ms"}</text>`);
    if (t.note) out.push(`<text class="soft" x="0" y="${bottom + 32}">${t.note}</text>`);
    const height = bottom + (t.note ? 38 : 20);
    box.innerHTML = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="timeline of ${t.bubble.length} ranks">${out.join("")}</svg>`;
  }

  function drawAll() { document.querySelectorAll(".timeline").forEach(draw); }

  function show(event) {
    const part = event.target instanceof Element ? event.target.closest("[data-t],[data-i]") : null;
    tip.hidden = !part;
    if (!part) return;
    tip.textContent = part.dataset.t ?? detail(data[part.closest(".timeline").dataset.timeline], +part.dataset.i);
    const {offsetWidth: w, offsetHeight: h} = tip;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - w - 4))}px`;
    tip.style.top = `${event.clientY + 18 + h > innerHeight ? event.clientY - h - 10 : event.clientY + 18}px`;
  }

  drawAll();
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
})();
"""
